// Causal attention over the KV cache.
//
// The rows of a prompt attend to almost the same keys and values, and are computed together; the result of a row does not
// depend on the rows beside it.
#pragma once
#include <cstdint>

namespace attention {

// `count` rows of queries, keys and values, and where their results go. The cache, which has their keys and values as well,
// is [slots, shared, length, dim].
struct Step {
  const float* qkv;
  const int64_t *slots, *positions;
  int64_t count, heads, shared, slots_in_cache, length, dim;  // heads: of queries; shared: of keys and values
  int64_t window;  // the positions that a row sees, 0: all
  float scale, cap;
  float* out;
};

// Attention of each row to the positions of its own slot. Kept is float or bfloat16. Raises an error for a row outside of
// the cache.
template <class Kept>
void attend(const Step& step, const Kept* keys, const Kept* values);

}  // namespace attention
