// choice.h for ctypes.
#include "choice.h"

using outrider::Choice;

extern "C" {
void* choice_new() { return new Choice(); }
void choice_free(void* choice) { delete static_cast<Choice*>(choice); }
int choice_begin(void* choice, int most, int64_t rows, double now, int crowded) {
    return static_cast<Choice*>(choice)->begin(most, rows, now, [=](int threads) { return crowded < threads ? crowded : threads; });
}
int choice_end(void* choice, double spent, double now) { return static_cast<Choice*>(choice)->end(spent, now); }
}
