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

    // `rows_per_task` rows at most in a task; `group` query heads per KV head.
    Status build(const CallPointers& c, int64_t vocab, int64_t rows_per_task, int64_t group) {
        for (int64_t i = 0; i < c.rows; ++i)
            if (c.token[i] < 0 || c.token[i] >= vocab) return BAD_TOKEN;
        for (int64_t i = 0; i < c.scored; ++i)
            if (c.scored_row[i] < 0 || c.scored_row[i] >= c.rows) return BAD_ROW;
        if (!segments_.reserve(c.segments) || !rows_.reserve(c.rows) || !identity_.reserve(c.rows)) return NO_MEMORY;
        for (int64_t i = 0; i < c.rows; ++i) identity_[i] = (int32_t)i;
        const Status status = read_segments(c);
        if (status != OK) return status;
        return cut(c, rows_per_task, group);
    }

    const Segment& segment(int64_t i) const { return segments_[i]; }
    const Row& row(int64_t i) const { return rows_[i]; }
    const Task& task(int64_t i) const { return tasks_[i]; }
    const Unit& unit(int64_t i) const { return units_[i]; }

   private:
    static constexpr int64_t FEW = 128;  // rows times group of a segment up to which parts are units of their own

    Status read_segments(const CallPointers& c) {
        const int64_t* in = c.segment;
        int64_t next = 0, path_total = 0, page_total = 0;
        for (int64_t i = 0; i < c.segments; ++i) {
            Segment& s = segments_[i];
            s = Segment{in[0], in[1], in[2], in[3], in[4], in[5], in + 6, in + 6 + in[4], nullptr, nullptr};
            const bool sound = s.slot >= 0 && s.slot < c.slots && s.first == next && s.cached >= 0 && s.prefix >= 1;
            if (!sound || s.nodes < 0 || s.ranges < 0 || next + s.rows() > c.rows) return BAD_SEGMENT;
            in += 6 + s.nodes + 2 * s.ranges;
            if (s.cached + s.rows() > c.capacity) return NO_ROOM;
            for (int64_t n = 0; n < s.nodes; ++n)
                if (s.parent[n] < 0 || s.parent[n] >= s.prefix + n) return BAD_SEGMENT;
            for (int64_t r = 0, past = 0; r < s.ranges; ++r) {
                const int64_t from = s.range[2 * r], to = s.range[2 * r + 1];
                if (from < past || to <= from || to > s.cached) return BAD_SEGMENT;
                past = to;
            }
            next += s.rows();
            path_total += s.nodes * s.rows();
            page_total += pages_of(c, s.cached + s.rows()) + 2 * s.ranges;
        }
        if (next != c.rows) return BAD_SEGMENT;
        if (!paths_.reserve(path_total) || !runs_.reserve(page_total) || !own_.reserve(c.rows)) return NO_MEMORY;
        Run* free_run = runs_ + 0;
        for (int64_t i = 0; i < c.segments && free_run != nullptr; ++i) free_run = read_pages(c, segments_[i], free_run);
        if (free_run == nullptr) return BAD_SEGMENT;
        int32_t* free_path = paths_ + 0;
        for (int64_t i = 0; i < c.segments; ++i) free_path = read_rows((int32_t)i, free_path);
        return OK;
    }

    // Tasks, and their units: the parts of few rows are taken one by one, so that a long sequence keeps all threads busy whatever its
    // number of heads; those of many rows together, since every part's result would have to be kept. Bits do not depend on it.
    Status cut(const CallPointers& c, int64_t rows_per_task, int64_t group) {
        if (!tasks_.reserve(c.rows)) return NO_MEMORY;
        tasks = units = kept = own_rows = task_rows = 0;
        for (int64_t i = 0; i < c.segments; ++i) {
            const Segment& s = segments_[i];
            const bool few = s.rows() * group <= FEW;
            own_rows = s.rows() > own_rows ? s.rows() : own_rows;
            for (int64_t o = 0; o < s.rows(); o += rows_per_task) {
                const int64_t count = s.rows() - o < rows_per_task ? s.rows() - o : rows_per_task;
                const int64_t parts = (s.cached + o + count + PART - 1) / PART;
                const bool split = few && parts > 1;
                tasks_[tasks++] = Task{(int32_t)i, (int32_t)o, (int32_t)count, parts, split ? kept : -1};
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
    Run* read_pages(const CallPointers& c, Segment& s, Run* run) {
        const int64_t* table = c.table + s.slot * pages_of(c, c.capacity);
        const int64_t all[2] = {0, s.cached}, own[2] = {s.cached, s.cached + s.rows()};
        s.run = run, s.own = own_ + s.first;
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
        each_run(s, s.cached, number, [&](int64_t place, int64_t count, int64_t at) {
            for (int64_t i = 0; i < count; ++i) own_[s.first + place - s.cached + i] = at + i;
        });
        return run;
    }

    // Rows of a plain chain share one list of offsets; others get their own, copied from their parent's.
    int32_t* read_rows(int32_t index, int32_t* free_path) {
        const Segment& s = segments_[index];
        for (int32_t o = 0; o < s.rows(); ++o) {
            Row& row = rows_[s.first + o];
            const int32_t parent = o < s.prefix ? o - 1 : (int32_t)s.parent[o - s.prefix];
            const int32_t depth = parent < 0 ? 1 : rows_[s.first + parent].depth + 1;
            row = Row{index, o, depth, identity_ + 0};
            if (depth == o + 1) continue;
            std::memcpy(free_path, rows_[s.first + parent].path, (depth - 1) * sizeof(int32_t));
            free_path[depth - 1] = o;
            row.path = free_path;
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
