// Who sees what in one forward, worked out (and checked: nothing may be read or written outside) before threads start.
#pragma once

#include "attention.h"
#include "layout.h"
#include "parallel.h"

namespace outrider {

// Some neighbouring rows of one segment: attention's unit of work, once per KV head.
struct Task {
    int32_t segment, offset, count;
};

class Plan {
   public:
    int64_t tasks = 0;
    int64_t score_floats = 0;  // scratch that the largest task needs

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
        if (!tasks_.reserve(c.rows)) return NO_MEMORY;
        tasks = score_floats = 0;
        for (int64_t i = 0; i < c.segments; ++i) {
            const Segment& s = segments_[i];
            for (int64_t o = 0; o < s.rows(); o += rows_per_task) {
                const int64_t count = s.rows() - o < rows_per_task ? s.rows() - o : rows_per_task;
                const int64_t need = count * group * (s.cached + o + count + SUM_LANES);
                score_floats = need > score_floats ? need : score_floats;
                tasks_[tasks++] = Task{(int32_t)i, (int32_t)o, (int32_t)count};
            }
        }
        return OK;
    }

    const Segment& segment(int64_t i) const { return segments_[i]; }
    const Row& row(int64_t i) const { return rows_[i]; }
    const Task& task(int64_t i) const { return tasks_[i]; }

   private:
    Status read_segments(const CallPointers& c) {
        const int64_t* in = c.segment;
        int64_t next = 0, path_total = 0, page_total = 0;
        for (int64_t i = 0; i < c.segments; ++i) {
            Segment& s = segments_[i];
            s = Segment{in[0], in[1], in[2], in[3], in[4], in + 5, nullptr, nullptr};
            in += 5 + s.nodes;
            const bool sound = s.slot >= 0 && s.slot < c.slots && s.first == next && s.cached >= 0 && s.prefix >= 1;
            if (!sound || s.nodes < 0 || next + s.rows() > c.rows) return BAD_SEGMENT;
            if (s.cached + s.rows() > c.capacity) return NO_ROOM;
            for (int64_t n = 0; n < s.nodes; ++n)
                if (s.parent[n] < 0 || s.parent[n] >= s.prefix + n) return BAD_SEGMENT;
            next += s.rows();
            path_total += s.nodes * s.rows();
            page_total += pages_of(c, s.cached + s.rows());
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

    static int64_t pages_of(const CallPointers& c, int64_t tokens) { return (tokens + c.page - 1) / c.page; }

    // The runs of a segment's tokens, and where its rows are. Null for a page that does not exist.
    Run* read_pages(const CallPointers& c, Segment& s, Run* run) {
        const int64_t* table = c.table + s.slot * pages_of(c, c.capacity);
        s.run = run, s.own = own_ + s.first;
        for (int64_t i = 0; i < pages_of(c, s.cached + s.rows()); ++i) {
            if (table[i] < 0 || table[i] >= c.pages) return nullptr;
            const int64_t end = (i + 1) * c.page, shift = (table[i] - i) * c.page;
            if (run > s.run && run[-1].shift == shift)
                run[-1].end = end;
            else
                *run++ = Run{end, shift};
        }
        each_run(s, s.cached, s.cached + s.rows(), [&](int64_t place, int64_t count, int64_t at) {
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
    Buffer<Run> runs_;
    Buffer<int64_t> own_;
    Buffer<int32_t> identity_, paths_;
};

}  // namespace outrider
