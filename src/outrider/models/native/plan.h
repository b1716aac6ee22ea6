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
        if (!tasks_.reserve(c.rows)) return NO_MEMORY;
        tasks = score_floats = 0;
        for (int64_t i = 0; i < c.segments; ++i) {
            const Segment& s = segments_[i];
            for (int64_t o = 0; o < s.rows(); o += rows_per_task) {
                const int64_t count = s.rows() - o < rows_per_task ? s.rows() - o : rows_per_task;
                const int64_t last = mutual ? s.end() : s.skipped + o + count;
                const int64_t need = count * group * (s.cached + last + SUM_LANES);
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
    Status read_segments(const CallPointers& c, const int64_t* skipped, bool mutual) {
        const int64_t* in = c.segment;
        int64_t next = 0, path_total = 0, longest = 0;
        for (int64_t i = 0; i < c.segments; ++i) {
            Segment& s = segments_[i];
            s = Segment{in[0], in[1], in[2], in[3], in[4], in + 5, skipped ? skipped[i] : 0};
            in += 5 + s.nodes;
            const bool sound = s.slot >= 0 && s.slot < c.slots && s.first == next && s.cached >= 0 && s.nodes >= 0;
            const bool fed = s.prefix >= (skipped ? 0 : 1) && s.skipped >= 0 && (s.skipped == 0 || s.prefix == 0) && s.rows() >= 1;
            if (!sound || !fed || next + s.rows() > c.rows) return BAD_SEGMENT;
            if (s.cached + s.end() > c.capacity) return NO_ROOM;
            for (int64_t n = 0; n < s.nodes; ++n)
                if (s.parent[n] < (s.prefix ? 0 : -1) || s.parent[n] >= s.prefix + n) return BAD_SEGMENT;
            next += s.rows();
            path_total += (s.nodes - s.skipped) * s.end();
            longest = s.end() > longest ? s.end() : longest;
        }
        if (next != c.rows) return BAD_SEGMENT;
        if (!paths_.reserve(path_total) || !identity_.reserve(longest)) return NO_MEMORY;
        for (int64_t i = 0; i < longest; ++i) identity_[i] = (int32_t)i;
        int32_t* free_path = paths_ + 0;
        for (int64_t i = 0; i < c.segments; ++i) free_path = read_rows((int32_t)i, free_path, mutual);
        return OK;
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
    Buffer<int32_t> identity_, paths_;
};

}  // namespace outrider
