// How many cores other processes leave, by the system's count of runnable threads.
//
// The count is of one moment and of the whole machine, containers and all, and does not say which cores the others are on: it gives
// bounds.
#pragma once

#include <cstdio>
#include <cstring>

#if defined(__linux__)
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>
#endif

namespace outrider {

// Cores that are left for a process, its own threads' included: at least and at most. Unknown: 0 and a large number.
struct Room {
    int least = 0, most = 1 << 30;
};

// Runnable threads in the text of /proc/loadavg ("0.53 1.19 2.94 2/100 8554": 2); 0 if it is something else.
inline int runnable_in(const char* text) {
    int runnable = 0, threads = 0;
    return std::sscanf(text, "%*f %*f %*f %d/%d", &runnable, &threads) == 2 && runnable > 0 ? runnable : 0;
}

// cores: of the machine. allowed: those that the process may use. ours: its runnable threads. Others may all be on the allowed
// cores, or first on those that it may not use.
inline Room room_beside(int runnable, int ours, int cores, int allowed) {
    if (runnable < 1) return {};
    const int others = runnable > ours ? runnable - ours : 0;
    const int least = allowed - others, most = cores - others < allowed ? cores - others : allowed;
    return {least > 0 ? least : 0, most > 1 ? most : 1};
}

// What is left now for a process of which `ours` threads are runnable and that wants `wanted`. Takes about 5 microseconds. Unknown
// where this thread is bound to fewer cores: it does not see those of the others.
inline Room room_now(int ours, int wanted) {
#if defined(__linux__)
    cpu_set_t allowed;
    static const long cores = sysconf(_SC_NPROCESSORS_ONLN);  // takes as long as all the rest
    const int file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    if (file < 0) return {};
    char text[128];
    const ssize_t bytes = read(file, text, sizeof text - 1);
    close(file);
    if (bytes <= 0 || cores < 1 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return {};
    text[bytes] = 0;
    const int seen = CPU_COUNT(&allowed);
    return seen < wanted ? Room() : room_beside(runnable_in(text), ours, (int)cores, seen);
#else
    (void)ours, (void)wanted;
    return {};
#endif
}

}  // namespace outrider
