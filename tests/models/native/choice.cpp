// choice.h, others.h and what crews share, for ctypes. A choice comes with two decoders: a target and a draft model.
#include "crew.h"

using namespace outrider;

namespace {

struct Process {
    explicit Process(int most) : choice(most) {}
    Choice choice;
    Times times[2];
    Forward forward;
};

}  // namespace

extern "C" {
void* choice_new(int most) { return new Process(most); }
void choice_free(void* process) { delete static_cast<Process*>(process); }
int choice_begin(void* process, int decoder, int64_t rows) {
    Process& p = *static_cast<Process*>(process);
    p.forward = p.choice.begin(rows, p.times[decoder]);
    return p.forward.threads;
}
int choice_end(void* process, int decoder, double spent, double now, int crowded, int least, int most) {
    Process& p = *static_cast<Process*>(process);
    if (p.choice.asks(crowded > 0, now)) p.choice.count({least, most}, now);
    return p.choice.end(p.forward, p.times[decoder], spent, now, [=](int threads, double) { return crowded < threads ? crowded : threads; });
}
const void* shared_choice(int most) { return &Crews::all().of(most); }
int runnable(const char* text) { return runnable_in(text); }
int least_room(int runnable, int ours, int cores, int allowed) { return room_beside(runnable, ours, cores, allowed).least; }
int most_room(int runnable, int ours, int cores, int allowed) { return room_beside(runnable, ours, cores, allowed).most; }
int least_room_now(int ours, int wanted) { return room_now(ours, wanted).least; }
int most_room_now(int ours, int wanted) { return room_now(ours, wanted).most; }
}
