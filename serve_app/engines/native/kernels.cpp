// Fused CPU operations for one step of a Llama-like model over flat rows.
//
// A row is one token of one sequence: it has a slot of the KV cache and a position in the slot. The operations treat
// decode rows and prompt chunks alike, so that one call takes any mixture of them, and the result of a row does not
// depend on other rows. Rows are float, the cache [slots, heads, length, dim] is float or bfloat16.
// A quantized linear layer takes each row scaled to [-1, 1], and the row's multiplier: the operation before it writes
// both (`out_scale`).
// kernels.py compiles all .cpp files on the machine where they run; tests/models/test_kernels.py compares it with torch.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "attention.h"
#include "matmul.h"
#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace {

using namespace vectors;
using at::Tensor;
using Optional = std::optional<Tensor>;

template <class F>
void for_type(const Tensor& t, F body) {
  if (t.scalar_type() == at::kFloat) return body((float*)nullptr);
  TORCH_CHECK(t.scalar_type() == at::kBFloat16, "float or bfloat16, not ", t.scalar_type());
  body((bf16*)nullptr);
}
#define TYPE_OF(tag) std::remove_pointer_t<decltype(tag)>

const float* floats(const Optional& t) { return t ? t->const_data_ptr<float>() : nullptr; }
const float* factors(const Optional& norm, int64_t width) {
  TORCH_CHECK(!norm || (norm->numel() == width && norm->is_contiguous()));
  return floats(norm);
}
// Rows per task of a thread: about 2,000 elements. The start of a thread costs more than the work on fewer.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 2048 / width); }

// The factor that scales a row with this largest magnitude to [-1, 1]; its inverse is stored as the row's multiplier.
inline float to_unit(float most, float* multiplier) {
  *multiplier = std::max(most, 1e-20f);
  return 1.f / *multiplier;
}
// A product with that factor may be rounded past 1.
inline Floats clamped(Floats v, float most) {
  v = v > most ? all(most) : v;
  return v < -most ? all(-most) : v;
}

// Checks the shape of a result of `rows` rows, and returns where the multipliers of its rows are written, if anywhere.
float* multipliers(const Tensor& out, const Optional& out_scale, int64_t rows) {
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == at::kFloat && out.size(0) == rows && out.size(1) % W == 0);
  TORCH_CHECK(!out_scale || (out_scale->numel() == rows && out_scale->scalar_type() == at::kFloat));
  return out_scale ? out_scale->data_ptr<float>() : nullptr;
}

// The factor of a norm by the root of the mean square.
inline float inverse_rms(Floats squares, int64_t width, double eps) { return 1.f / std::sqrt(sum(squares) / width + (float)eps); }

// x += residual * y, then out = x / rms(x) * weight, or out = x without weights. y is normalised first if it has weights.
void add_norm(Tensor x, const Optional& y, const Optional& y_weight, double residual, const Optional& weight, double eps,
              Tensor out, const Optional& out_scale) {
  const int64_t count = x.size(0), width = x.size(1);
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat && out.size(1) == width);
  TORCH_CHECK(!y || (y->is_contiguous() && y->sizes() == x.sizes() && y->scalar_type() == at::kFloat));
  float *rows = x.data_ptr<float>(), *results = out.data_ptr<float>(), *multiplier = multipliers(out, out_scale, count);
  const float *added = floats(y), *w = factors(weight, width), *y_w = factors(y_weight, width);
  at::parallel_for(0, count, grain(width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const int64_t row = r * width;
      Floats y_squares = {}, squares = {}, most = {};
      for (int64_t i = 0; y_w && i < width; i += W) y_squares += load(added + row + i) * load(added + row + i);
      const float y_factor = (float)residual * (y_w ? inverse_rms(y_squares, width, eps) : 1.f);
      for (int64_t i = 0; i < width; i += W) {
        Floats v = load(rows + row + i);
        if (added) {
          const Floats a = load(added + row + i) * y_factor;
          store(rows + row + i, v += y_w ? a * load(y_w + i) : a);
        }
        squares += v * v;
        if (multiplier) most = larger(most, magnitude(w ? v * load(w + i) : v));
      }
      const float norm = w ? inverse_rms(squares, width, eps) : 1.f;
      float factor = norm;
      if (multiplier) {
        factor = to_unit(largest(most), multiplier + r);
        multiplier[r] *= norm;
      }
      const float bound = multiplier ? 1.f : INFINITY;
      for (int64_t i = 0; i < width; i += W) {
        const Floats v = load(rows + row + i) * factor;
        store(results + row + i, clamped(w ? v * load(w + i) : v, bound));
      }
    }
  });
}

// out = act(gate) * up for rows [gate | up]. The activation is SiLU, or GELU by its approximation with tanh, which is
// x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3)).
void gated(const Tensor& gate_up, bool gelu, Tensor out, const Optional& out_scale) {
  const int64_t width = out.size(1), count = out.size(0);
  TORCH_CHECK(gate_up.is_contiguous() && gate_up.size(0) == count && gate_up.size(1) == 2 * width);
  TORCH_CHECK(gate_up.scalar_type() == at::kFloat);
  float* multiplier = multipliers(out, out_scale, count);
  at::parallel_for(0, count, grain(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float* gate = gate_up.const_data_ptr<float>() + row * 2 * width;
      float* result = out.data_ptr<float>() + row * width;
      Floats most = {};
      for (int64_t i = 0; i < width; i += W) {
        const Floats g = load(gate + i), z = gelu ? 1.5957691216f * (g + 0.044715f * g * g * g) : g;
        const Floats v = g / (1.f + exponential(-z)) * load(gate + width + i);
        store(result + i, v);
        most = larger(most, magnitude(v));
      }
      if (!multiplier) continue;
      const Floats factor = all(to_unit(largest(most), multiplier + row));
      for (int64_t i = 0; i < width; i += W) store(result + i, clamped(load(result + i) * factor, 1.f));
    }
  });
}

// Normalises `size` numbers, and then each next `size` up to `count`, in place, where weights are given.
void normalise(float* from, int64_t count, const Optional& weight, double eps) {
  if (!weight) return;
  const int64_t size = weight->numel();
  const float* w = weight->const_data_ptr<float>();
  for (const float* end = from + count; from < end; from += size) {
    Floats squares = {};
    for (int64_t i = 0; i < size; i += W) squares += load(from + i) * load(from + i);
    const float factor = inverse_rms(squares, size, eps);
    for (int64_t i = 0; i < size; i += W) store(from + i, load(from + i) * factor * load(w + i));
  }
}

// A number, and 0 instead of NaN and what is infinite in bfloat16: a weight of 0 must remove it from a sum.
inline Floats finite(Floats v) { return magnitude(v) < all(3.38e38f) ? v : all(0); }

// In place on rows [queries | keys | values]: norms of queries and keys where weights are given, of each head or of all
// heads together, and rotary embedding of halves (cos and sin: [length, dim / 2]). Writes keys and values to the cache.
void rope_store(Tensor qkv, int64_t heads, const Tensor& cos, const Tensor& sin, const Optional& query_norm,
                const Optional& key_norm, double eps, const Tensor& slots, const Tensor& positions, Tensor keys,
                Tensor values) {
  const int64_t shared = keys.size(1), length = keys.size(2), dim = keys.size(3), half = dim / 2;
  TORCH_CHECK(half % W == 0 && qkv.is_contiguous() && qkv.size(1) == (heads + 2 * shared) * dim);
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous() && values.sizes() == keys.sizes());
  TORCH_CHECK(values.scalar_type() == keys.scalar_type());
  TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && cos.size(0) >= length && cos.size(1) == half);
  TORCH_CHECK(!query_norm || query_norm->numel() == dim || query_norm->numel() == heads * dim);
  TORCH_CHECK(!key_norm || key_norm->numel() == dim || key_norm->numel() == shared * dim);
  const int64_t count = slots.numel();
  TORCH_CHECK(qkv.size(0) == count && qkv.scalar_type() == at::kFloat && positions.numel() == count);
  const int64_t *slot_of = slots.const_data_ptr<int64_t>(), *position_of = positions.const_data_ptr<int64_t>();
  for_type(keys, [&](auto* cache_tag) {
    using Kept = TYPE_OF(cache_tag);
    at::parallel_for(0, count, grain(qkv.size(1)), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) {
        const int64_t slot = slot_of[row], position = position_of[row];
        TORCH_CHECK(slot >= 0 && slot < keys.size(0) && position >= 0 && position < length, "row outside the cache");
        const float *c = cos.const_data_ptr<float>() + position * half, *s = sin.const_data_ptr<float>() + position * half;
        float* numbers = qkv.data_ptr<float>() + row * (heads + 2 * shared) * dim;
        normalise(numbers, heads * dim, query_norm, eps);
        normalise(numbers + heads * dim, shared * dim, key_norm, eps);
        for (int64_t h = 0; h < heads + 2 * shared; h++) {
          float* head = numbers + h * dim;
          const bool is_query = h < heads, is_value = h >= heads + shared;
          Kept* target = nullptr;
          if (!is_query) {
            Tensor& cache = is_value ? values : keys;
            target = cache.data_ptr<Kept>() + ((slot * shared + (h - heads) % shared) * length + position) * dim;
          }
          for (int64_t i = 0; i < half; i += W) {
            Floats a = load(head + i), b = load(head + half + i);
            Floats x = is_value ? a : a * load(c + i) - b * load(s + i);
            Floats y = is_value ? b : b * load(c + i) + a * load(s + i);
            store(head + i, x);
            store(head + half + i, y);
            if (target) {
              store(target + i, finite(x));
              store(target + half + i, finite(y));
            }
          }
        }
      }
    });
  });
}

// Causal attention of each row over the last `window` positions (0: all) of its own slot.
void attend(const Tensor& qkv, int64_t heads, double scale, double cap, int64_t window, const Tensor& slots,
            const Tensor& positions, const Tensor& keys, const Tensor& values, Tensor out, const Optional& out_scale) {
  const int64_t shared = keys.size(1), length = keys.size(2), dim = keys.size(3), rows = slots.numel(), width = heads * dim;
  TORCH_CHECK(length % W == 0 && keys.is_contiguous() && values.is_contiguous(), "cache of ", length, " positions");
  TORCH_CHECK(heads % shared == 0 && qkv.size(1) == (heads + 2 * shared) * dim && qkv.is_contiguous());
  TORCH_CHECK(qkv.size(0) == rows && out.size(1) == width);
  TORCH_CHECK(qkv.scalar_type() == at::kFloat && values.scalar_type() == keys.scalar_type());
  TORCH_CHECK(positions.numel() == rows);
  float* multiplier = multipliers(out, out_scale, rows);
  const attention::Step step{qkv.const_data_ptr<float>(), slots.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(),
                             rows, heads, shared, keys.size(0), length, dim, window, (float)scale, (float)cap,
                             out.data_ptr<float>()};
  for_type(keys, [&](auto* tag) {
    using Kept = TYPE_OF(tag);
    attention::attend(step, keys.const_data_ptr<Kept>(), values.const_data_ptr<Kept>());
  });
  for (int64_t row = 0; multiplier && row < rows; row++) {
    float* result = out.data_ptr<float>() + row * width;
    Floats most = {};
    for (int64_t i = 0; i < width; i += W) most = larger(most, magnitude(load(result + i)));
    const Floats factor = all(to_unit(largest(most), multiplier + row));
    for (int64_t i = 0; i < width; i += W) store(result + i, clamped(load(result + i) * factor, 1.f));
  }
}

// The largest value of each row and its first index; NaN and 0 for a row with a NaN.
std::tuple<Tensor, Tensor> argmax_of_rows(const Tensor& rows) {
  const int64_t count = rows.size(0), width = rows.size(1);
  TORCH_CHECK(rows.is_contiguous() && width > 0);
  Tensor values = at::empty({count}, at::kFloat), indices = at::empty({count}, at::kLong);
  float* value_of = values.data_ptr<float>();
  int64_t* index_of = indices.data_ptr<int64_t>();
  for_type(rows, [&](auto* tag) {
    using T = TYPE_OF(tag);
    at::parallel_for(0, count, grain(width), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) {
        const T* values = rows.const_data_ptr<T>() + row * width;
        const int64_t whole = width / W * W;
        Floats most = all(-INFINITY);
        Ints none = {};
        for (int64_t i = 0; i < whole; i += W) {
          const Floats v = load(values + i);
          most = larger(most, v);
          none |= v != v;
        }
        float best = largest(most);
        bool numbers = true;
        for (int i = 0; i < W; i++) numbers &= none[i] == 0;
        for (int64_t i = whole; i < width; i++) best = std::max(best, (float)values[i]), numbers &= values[i] == values[i];
        int64_t index = 0;
        if (numbers)
          while ((float)values[index] != best) index++;
        value_of[row] = numbers ? best : NAN;
        index_of[row] = index;
      }
    });
  });
  return {values, indices};
}

// Calls a linear layer by its index: Int8DotProductLinear or Int4DotProductLinear (bytes; `scale` are the multipliers of
// the rows), DotProductLinear (4-dimensional weights) or PlainLinear.
struct Linears {
  const at::TensorList weights;
  const c10::List<Optional> scales, biases;

  Tensor operator()(int64_t i, const Tensor& rows, const Optional& scale, const matmul::Extra* extra = nullptr) const {
    const Optional bias = biases.get(i);
    if (scale) return matmul::quantized(rows, weights[i], *scales.get(i), bias, *scale, extra);
    if (weights[i].dim() == 4) return matmul::bfloat16(rows, weights[i], bias, weights[i].size(0) * 16, extra);
    return at::linear(rows, weights[i], bias);
  }
};

// Rows, and their multipliers if the linear layer that takes them is quantized.
using Scaled = std::pair<Tensor, Optional>;

Scaled buffer(int64_t rows, int64_t width, bool quantized) {
  return {at::empty({rows, width}, at::kFloat), quantized ? Optional(at::empty({rows}, at::kFloat)) : std::nullopt};
}

// An MLP, whose linear layers are linear(0, rows), gate and up, and linear(1, rows), down.
template <class F>
Tensor mlp(const F& linear, const Scaled& rows, bool gelu) {
  const Tensor gate_up = linear(0, rows);
  const Scaled active = buffer(gate_up.size(0), gate_up.size(1) / 2, rows.second.has_value());
  gated(gate_up, gelu, active.first, active.second);
  return linear(1, active);
}

// How rows choose their experts; see Experts in fused_weights.py.
struct Routing {
  bool shared;
  int64_t top;
  bool normalised;
};

// The MLPs of `count` experts. The linear layers from i on are the router, the MLP and the gate of the shared expert, if
// there is one, and the MLPs of the experts. The rows of each expert are computed together.
Tensor experts(const Linears& linears, int64_t i, int64_t count, const Routing& routing, const Scaled& rows, bool gelu) {
  const Tensor exact = rows.second ? rows.first * rows.second->unsqueeze(1) : rows.first;
  const Tensor logits = linears(i, exact, std::nullopt).narrow(1, 0, count);
  auto [probabilities, chosen] = at::topk(at::softmax(logits, -1), routing.top);
  if (routing.normalised) probabilities.div_(probabilities.sum(-1, true));
  const int64_t first = i + (routing.shared ? 4 : 1);
  const int64_t* expert_of = chosen.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> choices(count);  // places in `chosen`
  for (int64_t place = 0; place < chosen.numel(); place++) choices[expert_of[place]].push_back(place);
  auto mlp_from = [&](int64_t place, const Scaled& part) {
    return mlp([&](int64_t j, const Scaled& input) { return linears(place + j, input.first, input.second); }, part, gelu);
  };
  Tensor y = at::zeros_like(rows.first);
  for (int64_t expert = 0; expert < count; expert++) {
    if (choices[expert].empty()) continue;
    const Tensor places = at::tensor(choices[expert], at::kLong), found = places.div(routing.top, "floor");
    const Scaled part{rows.first.index_select(0, found), rows.second ? Optional(rows.second->index_select(0, found)) : std::nullopt};
    const Tensor weights = probabilities.flatten().index_select(0, places);
    y.index_add_(0, found, mlp_from(first + 2 * expert, part).mul_(weights.unsqueeze(1)));
  }
  if (routing.shared)
    y.add_(mlp_from(i + 1, rows).mul_(linears(i + 3, exact, std::nullopt).narrow(1, 0, 1).sigmoid()));
  return y;
}

template <class V>
void prefetch(const V* from, int64_t count) {
  for (const char *line = (const char*)from, *end = (const char*)(from + count); line < end; line += 64)
    __builtin_prefetch(line);
}

// The rows that use LoRA adapters: rows[starts[g] .. starts[g + 1]), in ascending order, use adapter g, whose weights
// are data[g] and scales[g] at the places of tables[g]; see LoraWeights in lora.py. `widths` are the outputs of the
// seven projections of a layer.
class Adapters {
 public:
  Adapters(at::TensorList data, at::TensorList scales, at::TensorList tables, const Tensor& rows,
           at::IntArrayRef starts, at::IntArrayRef widths)
      : rows(rows.const_data_ptr<int64_t>()), starts(starts), widths(widths) {
    if (data.empty()) return;
    TORCH_CHECK(widths.size() == 7 && starts.size() == data.size() + 1 && rows.numel() == starts.back());
    TORCH_CHECK(tables.size() == data.size() && scales.size() == data.size());
    type = data[0].scalar_type();
    for (size_t g = 0; g < data.size(); g++) {
      TORCH_CHECK(data[g].scalar_type() == type && tables[g].size(1) == 4);
      adapters.push_back({data[g].const_data_ptr(), scales[g].const_data_ptr<float>(), tables[g].const_data_ptr<int64_t>()});
      for (int64_t i = 0; i < tables[g].size(0); i++) largest_rank = std::max(largest_rank, adapters[g].table[4 * i]);
    }
    const int64_t most = std::clamp<int64_t>(rows.numel() / (4 * at::get_num_threads()), 1, 16);
    for (int64_t g = 0; g < (int64_t)data.size(); g++)
      for (int64_t first = starts[g]; first < starts[g + 1]; first += most)
        tasks.push_back({g, first, std::min(starts[g + 1], first + most)});
    low.resize(rows.numel() * 3 * largest_rank);
  }

  bool empty() const { return adapters.empty(); }

  // The work of the adapters in one linear layer with the input rows `x`, null if they do not change the layer. `scale`
  // are the multipliers of the rows that the layer has applied to its result. The result of a row does not depend on
  // other rows. One work at a time can be used.
  std::unique_ptr<matmul::Extra> work(const Tensor& x, int64_t linear, const Optional& scale) {
    if (!changes(linear)) return nullptr;
    TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat && x.size(1) % W == 0);
    if (type == at::kChar) return std::make_unique<Work<int8_t>>(*this, x, linear, floats(scale));
    if (type == at::kFloat) return std::make_unique<Work<float>>(*this, x, linear, floats(scale));
    return std::make_unique<Work<bf16>>(*this, x, linear, floats(scale));
  }

  // Does the work for the result `y` of a linear layer that does not do it itself.
  static void add(const matmul::Extra* work, const Tensor& y, int64_t count) {
    if (!work) return;
    TORCH_CHECK(y.is_contiguous());
    at::parallel_for(0, work->count, 1, [&](int64_t from, int64_t to) {
      for (int64_t task = from; task < to; task++) work->before(task);
    });
    at::parallel_for(0, count, grain(y.size(1)), [&](int64_t from, int64_t to) {
      work->after(y.data_ptr(), y.size(1), {from, to, 0, y.size(1) / STRIP});
    });
  }

 private:
  // The first projection of each of the four linear layers, and of the next layer.
  static constexpr int64_t FIRST[] = {0, 3, 4, 6, 7};
  static constexpr int64_t STRIP = matmul::STRIP;

  struct Adapter {
    const void* data;
    const float* scales;
    const int64_t* table;

    const int64_t* entry(int64_t linear, int64_t projection) const { return table + 4 * (linear / 4 * 7 + projection); }
  };
  // Rows [first, last) of `rows`, which use one adapter.
  struct Task { int64_t adapter, first, last; };

  const int64_t* rows;
  at::IntArrayRef starts, widths;
  at::ScalarType type = at::kFloat;
  std::vector<Adapter> adapters;
  std::vector<Task> tasks;
  int64_t largest_rank = 0;
  std::vector<float> low;  // A x of each row, in the order of `rows`: [rows, projections, rank]

  bool changes(int64_t linear) const {
    for (const Adapter& adapter : adapters)
      for (int64_t p = FIRST[linear % 4]; p < FIRST[linear % 4 + 1]; p++)
        if (adapter.entry(linear, p)[0]) return true;
    return false;
  }

  template <class V>
  struct Work : matmul::Extra {
    // One projection of an adapter: A [rank, K] and the strips of B [outputs / 16, rank, 16], with a scale for each rank.
    struct Factors {
      int64_t rank;
      const V *down, *up;
      const float* scale;
    };

    Adapters& of;
    const int64_t begin, end, K;
    const float* x;
    const float* multipliers;
    const int64_t* rows;
    std::vector<Factors> parts;  // [adapters, projections]

    Work(Adapters& of, const Tensor& x, int64_t linear, const float* multipliers)
        : of(of), begin(FIRST[linear % 4]), end(FIRST[linear % 4 + 1]), K(x.size(1)), x(x.const_data_ptr<float>()),
          multipliers(multipliers), rows(of.rows) {
      count = of.tasks.size();
      parts.reserve(of.adapters.size() * (end - begin));
      for (const Adapter& one : of.adapters)
        for (int64_t p = begin; p < end; p++) {
          const int64_t* entry = one.entry(linear, p);
          parts.push_back({entry[0], (const V*)one.data + entry[1], (const V*)one.data + entry[2], one.scales + entry[3]});
        }
    }

    const Factors& part(int64_t g, int64_t p) const { return parts[g * (end - begin) + p - begin]; }
    float* low_of(int64_t i, int64_t p) const { return of.low.data() + (i * 3 + p - begin) * of.largest_rank; }

    void before(int64_t number) const override {
      const Task& task = of.tasks[number];
      for (int64_t p = begin; p < end; p++) {
        const auto& found = part(task.adapter, p);
        prefetch(found.down, found.rank * K);
        for (int64_t i = task.first; found.rank && i < task.last;)
          i += task.last - i >= 4 ? products<4>(found, i, p) : products<1>(found, i, p);
      }
    }

    void ahead(const matmul::Block& block) const override {
      for_parts(block, [&](const auto& found, int64_t p, int64_t strip, int64_t last, int64_t, int64_t, int64_t) {
        prefetch(found.up + strip * STRIP * found.rank, (last - strip) * STRIP * found.rank);
      });
    }

    void after(void* y, int64_t width, const matmul::Block& block) const override {
      for_parts(block, [&](const auto& found, int64_t p, int64_t strip, int64_t last, int64_t column, int64_t i, int64_t to) {
        for (; strip < last; strip++)
          for (int64_t row = i; row < to;) {
            float* out = (float*)y + column + strip * STRIP;
            row += to - row >= 4 ? add_strip<4>(found, row, p, strip, out, width) : add_strip<1>(found, row, p, strip, out, width);
          }
      });
    }

    // Calls body(its factors, projection, its strips from .. to, its first column, rows[i .. to]) for the parts of a block.
    template <class F>
    void for_parts(const matmul::Block& block, F body) const {
      for (int64_t g = 0; g < (int64_t)of.adapters.size(); g++) {
        const int64_t *first = rows + of.starts[g], *last = rows + of.starts[g + 1];
        const int64_t i = std::lower_bound(first, last, block.row) - rows, to = std::lower_bound(first, last, block.end) - rows;
        if (i == to) continue;
        for (int64_t p = begin, strip = 0; p < end; strip += of.widths[p++] / STRIP) {
          const int64_t from = std::max(block.strip - strip, (int64_t)0);
          const int64_t until = std::min(block.last - strip, of.widths[p] / STRIP);
          const auto& found = part(g, p);
          if (found.rank && from < until) body(found, p, from, until, strip * STRIP, i, to);
        }
      }
    }

    // low = A x for R rows; returns R.
    template <int R>
    int64_t products(const Factors& found, int64_t i, int64_t p) const {
      const float* from[R];
      float* to[R];
      for (int r = 0; r < R; r++) from[r] = x + rows[i + r] * K, to[r] = low_of(i + r, p);
      int64_t j = 0;
      for (; j + 4 <= found.rank; j += 4) dots<R, 4>(found, j, from, to);
      for (; j < found.rank; j++) dots<R, 1>(found, j, from, to);
      return R;
    }

    // The products of R rows with J rows of A, each summed in the order of K.
    template <int R, int J>
    void dots(const Factors& found, int64_t first, const float* const* from, float* const* to) const {
      Floats sums[R][J] = {};
      const V* a = found.down + first * K;
      for (int64_t k = 0; k < K; k += W) {
        Floats w[J];
        for (int j = 0; j < J; j++) w[j] = load(a + j * K + k);
        for (int r = 0; r < R; r++) {
          const Floats v = load(from[r] + k);
          for (int j = 0; j < J; j++) sums[r][j] += v * w[j];
        }
      }
      for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) to[r][first + j] = total(sums[r][j]) * found.scale[first + j];
    }

    // Adds B low to a strip of R rows; returns R.
    template <int R>
    int64_t add_strip(const Factors& found, int64_t i, int64_t p, int64_t strip, float* y, int64_t width) const {
      const V* b = found.up + strip * STRIP * found.rank;
      constexpr int parts = STRIP / W;
      const float* factor[R];
      for (int r = 0; r < R; r++) factor[r] = low_of(i + r, p);
      Floats sums[R][parts] = {};
      for (int64_t j = 0; j < found.rank; j++)
        for (int c = 0; c < parts; c++) {
          const Floats w = load(b + j * STRIP + c * W);
          for (int r = 0; r < R; r++) sums[r][c] += factor[r][j] * w;
        }
      for (int r = 0; r < R; r++) {
        const Floats m = all(multipliers ? multipliers[rows[i + r]] : 1.f);
        float* to = y + rows[i + r] * width;
        for (int c = 0; c < parts; c++) store(to + c * W, load(to + c * W) + sums[r][c] * m);
      }
      return R;
    }
  };
};

void add_lora(Tensor y, const Tensor& x, const Optional& scale, at::TensorList data, at::TensorList scales,
              at::TensorList tables, const Tensor& rows, at::IntArrayRef starts, at::IntArrayRef widths, int64_t linear) {
  Adapters adapters{data, scales, tables, rows, starts, widths};
  Adapters::add(adapters.work(x, linear, scale).get(), y, y.size(0));
}

// The loop over all layers, as in fused.py, without Python, so that other threads can hold the interpreter lock.
// `norms` holds four norms per layer (before and after the attention, before and after the MLP), and the last norm;
// `weights` holds the linear layers of each layer: queries, keys and values; out; gate and up; down. A layer with
// `experts` has those of the function `experts` instead of the last two. `rotary` is the index
// of a layer's tables in `cos` and `sin`. For the other numbers see Numbers in families.py. Returns the head's input for
// the wanted rows.
std::tuple<Tensor, Optional> layers(
    Tensor x, const c10::List<Optional>& norms, at::TensorList weights, const c10::List<Optional>& scales,
    const c10::List<Optional>& biases, const c10::List<Optional>& query_norms, const c10::List<Optional>& key_norms,
    at::IntArrayRef rotary, at::IntArrayRef windows, int64_t heads, double eps, double score_scale, double score_cap,
    double residual, bool gelu, at::IntArrayRef expert_counts, bool shared_expert, int64_t top, bool normalised,
    at::TensorList cos, at::TensorList sin, Tensor slots, Tensor positions, const Tensor& wanted,
    at::TensorList keys, at::TensorList values, at::TensorList lora, at::TensorList lora_scales,
    at::TensorList lora_tables, const Tensor& lora_rows, at::IntArrayRef lora_starts, at::TensorList last_lora,
    at::TensorList last_scales, at::TensorList last_tables, const Tensor& last_rows, at::IntArrayRef last_starts,
    at::IntArrayRef lora_widths) {
  const Linears base{weights, scales, biases};
  Adapters all{lora, lora_scales, lora_tables, lora_rows, lora_starts, lora_widths};
  Adapters last{last_lora, last_scales, last_tables, last_rows, last_starts, lora_widths};
  Adapters* adapters = &all;
  int64_t next = 0;  // of the linear layers
  // The result of the next linear layer, which is number `number` for adapters.
  auto linear = [&](int64_t number, const Scaled& rows) {
    const int64_t i = next++;
    if (adapters->empty()) return base(i, rows.first, rows.second);
    const auto work = adapters->work(rows.first, number, rows.second);
    if (weights[i].dim() > 2) return base(i, rows.first, rows.second, work.get());
    const Tensor y = base(i, rows.first, rows.second);
    Adapters::add(work.get(), y, x.size(0));
    return y;
  };
  const int64_t count = windows.size(), dim = keys[0].size(3);
  const bool quantized = scales.get(0).has_value();
  const Routing routing{shared_expert, top, normalised};
  Tensor y;
  Scaled normed = buffer(x.size(0), x.size(1), quantized);
  // Adds the result of the part of a layer before norm i, which has the norm i - 1 of its own.
  auto norm = [&](int64_t i) {
    const Optional added = i ? Optional(y) : std::nullopt, weight = i ? norms.get(i - 1) : std::nullopt;
    add_norm(x, added, weight, residual, norms.get(i), eps, normed.first, normed.second);
  };
  for (int64_t i = 0; i < count; i++) {
    norm(4 * i);
    Tensor qkv = linear(4 * i, normed);
    rope_store(qkv, heads, cos[rotary[i]], sin[rotary[i]], query_norms.get(i), key_norms.get(i), eps, slots, positions, keys[i], values[i]);
    if (i == count - 1) {
      // The other rows are complete when their keys and values are stored.
      x = x.index_select(0, wanted), qkv = qkv.index_select(0, wanted);
      slots = slots.index_select(0, wanted), positions = positions.index_select(0, wanted);
      normed = buffer(x.size(0), x.size(1), quantized);
      adapters = &last;
    }
    const Scaled attended = buffer(x.size(0), heads * dim, quantized);
    attend(qkv, heads, score_scale, score_cap, windows[i], slots, positions, keys[i], values[i], attended.first, attended.second);
    y = linear(4 * i + 1, attended);
    norm(4 * i + 2);
    if (expert_counts[i]) {
      y = experts(base, next, expert_counts[i], routing, normed, gelu);
      next += 2 * expert_counts[i] + (shared_expert ? 4 : 1);
      continue;
    }
    y = mlp([&](int64_t j, const Scaled& rows) { return linear(4 * i + 2 + j, rows); }, normed, gelu);
  }
  norm(4 * count);
  return normed;
}

}  // namespace

TORCH_LIBRARY(serve_app, library) {
  library.def(
      "add_norm(Tensor(a!) x, Tensor? y, Tensor? y_weight, float residual, Tensor? weight, float eps, Tensor(b!) out, "
      "Tensor(c!)? out_scale) -> ()",
      &add_norm);
  library.def("gated(Tensor gate_up, bool gelu, Tensor(a!) out, Tensor(b!)? out_scale) -> ()", &gated);
  library.def(
      "rope_store(Tensor(a!) qkv, int heads, Tensor cos, Tensor sin, Tensor? query_norm, "
      "Tensor? key_norm, float eps, Tensor slots, Tensor positions, Tensor(b!) keys, Tensor(c!) values) -> ()",
      &rope_store);
  library.def(
      "attend(Tensor qkv, int heads, float scale, float cap, int window, Tensor slots, Tensor positions, Tensor keys, "
      "Tensor values, Tensor(a!) out, Tensor(b!)? out_scale) -> ()",
      &attend);
  library.def("pack_strips(Tensor weight) -> Tensor", &matmul::packed);
  library.def("linear_bfloat16(Tensor rows, Tensor weight, Tensor? bias, int outputs) -> Tensor",
              [](const Tensor& rows, const Tensor& weight, const Optional& bias, int64_t outputs) {
                return matmul::bfloat16(rows, weight, bias, outputs);
              });
  library.def(
      "linear_quantized(Tensor rows, Tensor weight, Tensor scales, Tensor? bias, Tensor row_scales) -> Tensor",
      [](const Tensor& rows, const Tensor& weight, const Tensor& scales, const Optional& bias, const Tensor& row_scales) {
        return matmul::quantized(rows, weight, scales, bias, row_scales);
      });
  library.def("argmax_of_rows(Tensor rows) -> (Tensor, Tensor)", &argmax_of_rows);
  library.def(
      "layers(Tensor(a!) x, Tensor?[] norms, Tensor[] weights, Tensor?[] scales, Tensor?[] biases, "
      "Tensor?[] query_norms, Tensor?[] key_norms, "
      "int[] rotary, int[] windows, int heads, float eps, float score_scale, float score_cap, float residual, bool gelu, "
      "int[] experts, bool shared_expert, int top, bool normalised, "
      "Tensor[] cos, Tensor[] sin, Tensor slots, Tensor positions, Tensor wanted, "
      "Tensor(b!)[] keys, Tensor(c!)[] values, Tensor[] lora, Tensor[] lora_scales, Tensor[] lora_tables, "
      "Tensor lora_rows, int[] lora_starts, Tensor[] last_lora, Tensor[] last_scales, Tensor[] last_tables, "
      "Tensor last_rows, int[] last_starts, int[] lora_widths) -> (Tensor, Tensor?)",
      &layers);
  library.def(
      "add_lora(Tensor(a!) y, Tensor x, Tensor? scale, Tensor[] data, Tensor[] scales, Tensor[] tables, Tensor rows, "
      "int[] starts, int[] widths, int linear) -> ()",
      &add_lora);
}
