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
        int64_t next = 0, path_total = 0;
        for (int64_t i = 0; i < c.segments; ++i) {
            Segment& s = segments_[i];
            s = Segment{in[0], in[1], in[2], in[3], in[4], in + 5};
            in += 5 + s.nodes;
            const bool sound = s.slot >= 0 && s.slot < c.slots && s.first == next && s.cached >= 0 && s.prefix >= 1;
            if (!sound || s.nodes < 0 || next + s.rows() > c.rows) return BAD_SEGMENT;
            if (s.cached + s.rows() > c.capacity) return NO_ROOM;
            for (int64_t n = 0; n < s.nodes; ++n)
                if (s.parent[n] < 0 || s.parent[n] >= s.prefix + n) return BAD_SEGMENT;
            next += s.rows();
            path_total += s.nodes * s.rows();
        }
        if (next != c.rows) return BAD_SEGMENT;
        if (!paths_.reserve(path_total)) return NO_MEMORY;
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
    Buffer<int32_t> identity_, paths_;
};

}  // namespace outrider
