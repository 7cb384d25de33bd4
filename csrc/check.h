// The one check of every op's arguments on the C++ side; `ekfac_fast/ops/shapes.py` is its twin.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <vector>

namespace ekfac_fast {

// Sizes bound by `check`; letters as in shapes.py.
struct Letters {
  int64_t B = 1, T = 1, I = 0, J = 0, O = 0, Q = 0, K = 0, N = 0;
};

using Arguments = std::vector<std::optional<at::Tensor>>;

// Binds the letters of a card's shape line, e.g. "cov[J,J] x[N,I] mask[N]", to the sizes of `args`,
// left to right; refuses the first argument that contradicts them. An absent argument is skipped.
// Messages are equal to those of shapes.py, word for word.
Letters check(const char* op, const char* line, const Arguments& args, bool bias,
              double damping = 0.0, const std::optional<c10::string_view>& order = {});

// Which sides of a gradient are rotated token by token; `gradients.py` has the costs and computes
// the same.
struct Order {
  bool a_tokens, g_tokens;
};
// `forced` has passed `check`.
Order contraction_order(const Letters& size, const std::optional<c10::string_view>& forced);

}  // namespace ekfac_fast
