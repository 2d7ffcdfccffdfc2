// The attention: which rows are a prompt, the threads, and the ways to compute them. See attention.h.
//
// A file of its own, so that the compiler works on it beside kernels.cpp.
#include "attention.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <atomic>

#include "attention_tiles.h"
#include "attention_vectors.h"

namespace attention {
namespace {

Range range_of(const Step& step, int64_t row) {
  const int64_t end = step.positions[row] + 1;
  return {step.window > 0 ? std::max<int64_t>(0, end - step.window) : 0, end};
}

// Rows of one task of a thread, and the fewest rows for which keys are transposed.
constexpr int64_t TASK_ROWS = 32, FEWEST_ROWS = 6;

// Attention of the heads that share key-value head h, for the adjacent rows [first, last) of one sequence.
template <class Way, int D, class Kept>
void attend_prompt(const Step& step, int64_t first, int64_t last, int64_t h, const Kept* keys, const Kept* values) {
  const int64_t group = step.heads / step.shared, count = (last - first) * group;
  const int64_t base = rounded_down(range_of(step, first).low, Way::FROM);
  const int64_t length = rounded_up(range_of(step, last - 1).end, Way::TO) - base;
  const int64_t offset = ((step.slots[first] * step.shared + h) * step.length + base) * D;
  Scratch& scratch = Scratch::of_thread();
  auto* queries = (typename Way::Query*)room(scratch.queries, rounded_up(count, 16) * D), *query = queries;
  scratch.ranges.clear();
  for (int64_t row = first; row < last; row++)
    for (int64_t g = 0; g < group; g++, query += D) {
      const float* from = step.qkv + (row * (step.heads + 2 * step.shared) + h * group + g) * D;
      for (int i = 0; i < D; i += W) store(query + i, load(from + i) * step.scale);
      scratch.ranges.push_back(range_of(step, row).from(base));
    }
  Way way(keys + offset, values + offset, length, step.cap, scratch);
  float* results = room(scratch.results, Way::QUERIES * D);
  for (int64_t q = 0; q < count; q += Way::QUERIES) {
    const int64_t these = std::min(Way::QUERIES, count - q);
    way.attend(queries + q * D, scratch.ranges.data() + q, these, results);
    for (int64_t i = q; i < q + these; i++)
      std::copy_n(results + (i - q) * D, D, step.out + ((first + i / group) * step.heads + h * group + i % group) * D);
  }
}

// A key-value head of one row.
struct Part {
  int64_t row, head;
};

// Attention of the heads that share a key-value head, for one row. `next` is what this thread computes next.
template <int G, int D, class Kept>
void attend_row(const Step& step, Part part, Part next, const Kept* keys, const Kept* values) {
  const auto [row, h] = part;
  const int64_t group = step.heads / step.shared, stride = (step.heads + 2 * step.shared) * D;
  const auto [low, end] = range_of(step, row);
  const int64_t begin = rounded_down(low, W), offset = ((step.slots[row] * step.shared + h) * step.length + begin) * D;
  const Kept* ahead = step.slots[next.row] == step.slots[row] ? nullptr
      : keys + ((step.slots[next.row] * step.shared + next.head) * step.length + begin) * D;
  float* scores = room(Scratch::of_thread().scores, G * (end - begin + W));
  for (int64_t g = h * group; g < (h + 1) * group; g += G)
    attend_heads<G, D, Kept>(step.qkv + row * stride + g * D, keys + offset, values + offset, low - begin, end - begin,
                             step.scale, step.cap, scores, step.out + (row * step.heads + g) * D, ahead);
}

// Rows [first, last) of a prompt.
struct Prompt {
  int64_t first, last;
};

// Whether AMX tiles compute all rows, as if each were a prompt.
template <class Kept>
bool by_tiles(const Step& step) {
#ifdef SERVE_APP_TILES
  return std::is_same_v<Kept, bf16> && tiles::usable && step.length % 32 == 0;
#else
  return false;
#endif
}

// Attention of the prompts that are not `taken` yet, one part after the other.
template <class Way, int D, class Kept>
void attend_prompts(const Step& step, const std::vector<Prompt>& prompts, std::atomic<int64_t>& taken, const Kept* keys,
                    const Kept* values) {
  for (int64_t part; (part = taken++) < (int64_t)prompts.size() * step.shared;) {
    const Prompt& prompt = prompts[part / step.shared];
    attend_prompt<Way, D>(step, prompt.first, prompt.last, part % step.shared, keys, values);
  }
}

// Attention of all rows: the threads take the prompts one after the other, and the rows that are no prompt in turn.
template <int G, int D, class Kept>
void attend_all(const Step& step, const std::vector<Prompt>& prompts, const std::vector<int64_t>& rows, const Kept* keys,
                const Kept* values) {
  const int64_t single = rows.size() * step.shared;
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), prompts.size() * step.shared + single);
  std::atomic<int64_t> taken{0};
  auto part = [&](int64_t task) { return Part{rows[task / step.shared], task % step.shared}; };
  at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; worker++) {
#ifdef SERVE_APP_TILES
      if constexpr (std::is_same_v<Kept, bf16>)
        if (by_tiles<Kept>(step)) {
          attend_prompts<ByTiles<D>, D>(step, prompts, taken, keys, values);
          continue;
        }
#endif
      attend_prompts<ByVectors<D, Kept>, D>(step, prompts, taken, keys, values);
      // Adjacent rows often have similar lengths: assigned in turn, they balance the threads.
      for (int64_t task = worker; task < single; task += workers) {
        const int64_t next = std::min(task + workers, single - 1);
        attend_row<G, D>(step, part(task), part(next), keys, values);
      }
    }
  });
}

// The rows of prompts with at least `fewest` rows, in parts of TASK_ROWS, and all other rows.
void separate(const Step& step, int64_t fewest, std::vector<Prompt>& prompts, std::vector<int64_t>& rows) {
  for (int64_t row = 0, end; row < step.count; row = end) {
    for (end = row; end < step.count && step.slots[end] == step.slots[row]; end++) {
      if (step.positions[end] != step.positions[row] + end - row) break;
      TORCH_CHECK(step.slots[end] >= 0 && step.slots[end] < step.slots_in_cache, "row outside the cache");
      TORCH_CHECK(step.positions[end] >= 0 && step.positions[end] < step.length, "row outside the cache");
    }
    const int64_t size = end - row >= fewest ? TASK_ROWS : 0;
    for (int64_t from = row; size && from < end; from += size) prompts.push_back({from, std::min(from + size, end)});
    for (int64_t from = row; !size && from < end; from++) rows.push_back(from);
  }
}

}  // namespace

template <class Kept>
void attend(const Step& step, const Kept* keys, const Kept* values) {
  const int64_t group = step.heads / step.shared;
  std::vector<Prompt> prompts;
  std::vector<int64_t> rows;
  separate(step, by_tiles<Kept>(step) ? 1 : FEWEST_ROWS, prompts, rows);
  auto with = [&](auto group_size, auto head_size) {
    attend_all<group_size, head_size>(step, prompts, rows, keys, values);
  };
  constexpr std::integral_constant<int, 1> one;
  auto with_head = [&](auto head_size) {
    // The more heads a call takes, the more often it reuses loaded keys and values, until the registers are full.
    if constexpr (W == 16) {
      if (group % 4 == 0) return with(std::integral_constant<int, 4>(), head_size);
      if (group % 3 == 0) return with(std::integral_constant<int, 3>(), head_size);
      if (group % 2 == 0) return with(std::integral_constant<int, 2>(), head_size);
    }
    with(one, head_size);
  };
  switch (step.dim) {
    case 64: return with_head(std::integral_constant<int, 64>());
    case 96: return with(one, std::integral_constant<int, 96>());
    case 128: return with_head(std::integral_constant<int, 128>());
    case 256: return with(one, std::integral_constant<int, 256>());
    default: TORCH_CHECK(false, "head size ", step.dim);
  }
}

template void attend(const Step&, const float*, const float*);
template void attend(const Step&, const bf16*, const bf16*);

}  // namespace attention
