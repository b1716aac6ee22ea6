// Who sees what in one forward, worked out (and checked: nothing may be read or written outside) before threads start.
#pragma once

#include "attention.h"
#include "layout.h"
#include "parallel.h"

namespace outrider {

// Some neighbouring rows of one segment that read their keys together, once per KV head.
struct Task {
    int32_t segment, offset, count;
    int64_t parts, kept;  // of its visible keys; where its parts' results are kept (in queries), -1 if one thread folds them
    bool mass;            // whether it tells where its rows look: the last rows of a segment without ranges do
};

// What a thread takes at a time: the parts from : to of a task.
struct Unit {
    int32_t task;
    int64_t from, to;
};

class Plan {
   public:
    int64_t tasks = 0, units = 0;
    int64_t kept = 0;          // results of queries in single parts that are kept for folding, per KV head
    int64_t own_rows = 0, task_rows = 0;  // most of a segment and of a task

    // `rows_per_task` rows at most in a task; `group` query heads per KV head. skipped: of each segment, null for none: then nodes may
    // also follow the cached tokens (parent -1). mutual: rows see all rows of their segment.
    Status build(
        const CallPointers& c, int64_t vocab, int64_t rows_per_task, int64_t group, const int64_t* skipped = nullptr, bool mutual = false
    ) {
        for (int64_t i = 0; i < c.rows; ++i)
            if (c.token[i] < 0 || c.token[i] >= vocab) return BAD_TOKEN;
        for (int64_t i = 0; i < c.scored; ++i)
            if (c.scored_row[i] < 0 || c.scored_row[i] >= c.rows) return BAD_ROW;
        if (!segments_.reserve(c.segments) || !rows_.reserve(c.rows)) return NO_MEMORY;
        const Status status = read_segments(c, skipped, mutual);
        if (status != OK) return status;
        return cut(c, rows_per_task, group, mutual);
    }

    const Segment& segment(int64_t i) const { return segments_[i]; }
    const Row& row(int64_t i) const { return rows_[i]; }
    const Task& task(int64_t i) const { return tasks_[i]; }
    const Unit& unit(int64_t i) const { return units_[i]; }

   private:
    static constexpr int64_t FEW = 128;  // rows times group of a segment up to which parts are units of their own

    Status read_segments(const CallPointers& c, const int64_t* skipped, bool mutual) {
        const int64_t* in = c.segment;
        int64_t next = 0, path_total = 0, page_total = 0, own_total = 0, longest = 0;
        for (int64_t i = 0; i < c.segments; ++i) {
            Segment& s = segments_[i];
            s = Segment{in[0], in[1], in[2], in[3], in[4], in[5], in + 6, in + 6 + in[4], nullptr, nullptr, skipped ? skipped[i] : 0};
            const bool sound = s.slot >= 0 && s.slot < c.slots && s.first == next && s.cached >= 0 && s.nodes >= 0 && s.ranges >= 0;
            const bool fed = s.prefix >= (skipped ? 0 : 1) && s.skipped >= 0 && (s.skipped == 0 || s.prefix == 0) && s.rows() >= 1;
            if (!sound || !fed || next + s.rows() > c.rows) return BAD_SEGMENT;
            in += 6 + s.nodes + 2 * s.ranges;
            if (s.cached + s.end() > c.capacity) return NO_ROOM;
            for (int64_t n = 0; n < s.nodes; ++n)
                if (s.parent[n] < (s.prefix ? 0 : -1) || s.parent[n] >= s.prefix + n) return BAD_SEGMENT;
            for (int64_t r = 0, past = 0; r < s.ranges; ++r) {
                const int64_t from = s.range[2 * r], to = s.range[2 * r + 1];
                if (from < past || to <= from || to > s.cached) return BAD_SEGMENT;
                past = to;
            }
            next += s.rows();
            path_total += (s.nodes - s.skipped) * s.end();
            page_total += pages_of(c, s.cached + s.end()) + 2 * s.ranges;
            own_total += s.end();
            longest = s.end() > longest ? s.end() : longest;
        }
        if (next != c.rows) return BAD_SEGMENT;
        if (!paths_.reserve(path_total) || !runs_.reserve(page_total) || !own_.reserve(own_total) || !identity_.reserve(longest))
            return NO_MEMORY;
        for (int64_t i = 0; i < longest; ++i) identity_[i] = (int32_t)i;
        Run* free_run = runs_ + 0;
        int64_t* free_own = own_ + 0;
        for (int64_t i = 0; i < c.segments && free_run != nullptr; free_own += segments_[i++].end())
            free_run = read_pages(c, segments_[i], free_run, free_own);
        if (free_run == nullptr) return BAD_SEGMENT;
        int32_t* free_path = paths_ + 0;
        for (int64_t i = 0; i < c.segments; ++i) free_path = read_rows((int32_t)i, free_path, mutual);
        return OK;
    }

    // Tasks, and their units: the parts of few rows are taken one by one, so that a long sequence keeps all threads busy whatever its
    // number of heads; those of many rows together, since every part's result would have to be kept. Bits do not depend on it.
    Status cut(const CallPointers& c, int64_t rows_per_task, int64_t group, bool mutual) {
        if (!tasks_.reserve(c.rows)) return NO_MEMORY;
        tasks = units = kept = own_rows = task_rows = 0;
        for (int64_t i = 0; i < c.segments; ++i) {
            const Segment& s = segments_[i];
            const bool few = s.rows() * group <= FEW;
            own_rows = s.end() > own_rows ? s.end() : own_rows;
            for (int64_t o = 0; o < s.rows(); o += rows_per_task) {
                const int64_t count = s.rows() - o < rows_per_task ? s.rows() - o : rows_per_task;
                const int64_t last = mutual ? s.end() : s.skipped + o + count;
                const int64_t parts = (s.cached + last + PART - 1) / PART;
                const bool mass = c.mass != nullptr && s.ranges == 0 && o + count == s.rows();
                if (mass && parts * CHUNKS > c.chunks) return BAD_SEGMENT;
                const bool split = (few && parts > 1) || mass;
                tasks_[tasks++] = Task{(int32_t)i, (int32_t)o, (int32_t)count, parts, split ? kept : -1, mass};
                kept += split ? parts * count * group : 0;
                units += split ? parts : 1;
                task_rows = count > task_rows ? count : task_rows;
            }
        }
        if (!units_.reserve(units)) return NO_MEMORY;
        int64_t next = 0;
        for (int64_t t = 0; t < tasks; ++t) {
            const int64_t parts = tasks_[t].parts, step = tasks_[t].kept < 0 ? parts : 1;
            for (int64_t p = 0; p < parts; p += step) units_[next++] = Unit{(int32_t)t, p, p + step};
        }
        return OK;
    }

    static int64_t pages_of(const CallPointers& c, int64_t tokens) { return (tokens + c.page - 1) / c.page; }

    // The runs of what a segment sees, and where its rows are; from here on `cached` counts the cached tokens that it sees. Null for
    // a page that does not exist.
    Run* read_pages(const CallPointers& c, Segment& s, Run* run, int64_t* at_own) {
        const int64_t* table = c.table + s.slot * pages_of(c, c.capacity);
        const int64_t all[2] = {0, s.cached}, own[2] = {s.cached, s.cached + s.end()};
        s.run = run, s.own = at_own;
        int64_t number = 0;
        const auto add = [&](const int64_t* range) {
            for (int64_t from = range[0], to; from < range[1]; from = to) {
                const int64_t page = table[from / c.page], end = (from / c.page + 1) * c.page;
                if (page < 0 || page >= c.pages) return false;
                to = end < range[1] ? end : range[1];
                const int64_t shift = page * c.page + from % c.page - number;
                number += to - from;
                if (run > s.run && run[-1].shift == shift)
                    run[-1].end = number;
                else
                    *run++ = Run{number, shift};
            }
            return true;
        };
        bool sound = s.ranges > 0 || add(all);
        for (int64_t r = 0; r < s.ranges; ++r) sound = sound && add(s.range + 2 * r);
        s.cached = number;
        if (!sound || !add(own)) return nullptr;
        s.runs = run - s.run;
        each_run(s, s.cached, number, [&](int64_t place, int64_t count, int64_t at) {
            for (int64_t i = 0; i < count; ++i) at_own[place - s.cached + i] = at + i;
        });
        return run;
    }

    // Rows of a plain chain share one list of offsets; others get their own, from themselves up to the prefix.
    int32_t* read_rows(int32_t index, int32_t* free_path, bool mutual) {
        const Segment& s = segments_[index];
        const auto parent = [&](int64_t o) { return s.parent[o - s.prefix]; };
        for (int64_t o = s.skipped; o < s.end(); ++o) {
            int64_t depth = 0, at = o;
            for (; at >= s.prefix; at = parent(at)) ++depth;
            depth = mutual ? s.end() : depth + at + 1;  // `at` is the last row of the prefix that is seen, or -1
            Row& row = rows_[s.first + o - s.skipped];
            row = Row{index, (int32_t)o, (int32_t)depth, identity_ + 0};
            if (mutual || depth == o + 1) continue;
            row.path = free_path;
            int64_t place = depth;
            for (at = o; at >= s.prefix; at = parent(at)) free_path[--place] = (int32_t)at;
            while (--place >= 0) free_path[place] = (int32_t)place;
            free_path += depth;
        }
        return free_path;
    }

    Buffer<Segment> segments_;
    Buffer<Row> rows_;
    Buffer<Task> tasks_;
    Buffer<Unit> units_;
    Buffer<Run> runs_;
    Buffer<int64_t> own_;
    Buffer<int32_t> identity_, paths_;
};

}  // namespace outrider
