// choice.h and others.h for ctypes.
#include "choice.h"

using namespace outrider;

extern "C" {
void* choice_new() { return new Choice(); }
void choice_free(void* choice) { delete static_cast<Choice*>(choice); }
int choice_begin(void* choice, int most, int64_t rows) { return static_cast<Choice*>(choice)->begin(most, rows); }
int choice_end(void* choice, double spent, double now, int crowded, int least, int most) {
    Choice& c = *static_cast<Choice*>(choice);
    if (c.asks(crowded > 0, now)) c.count({least, most}, now);
    return c.end(spent, now, [=](int threads, double) { return crowded < threads ? crowded : threads; });
}
int runnable(const char* text) { return runnable_in(text); }
int least_room(int runnable, int ours, int cores, int allowed) { return room_beside(runnable, ours, cores, allowed).least; }
int most_room(int runnable, int ours, int cores, int allowed) { return room_beside(runnable, ours, cores, allowed).most; }
int least_room_now(int ours, int wanted) { return room_now(ours, wanted).least; }
int most_room_now(int ours, int wanted) { return room_now(ours, wanted).most; }
}
