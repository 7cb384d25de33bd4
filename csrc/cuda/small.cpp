// The six ops on a GPU. Small calls compute for less time than a host takes to launch our kernels:
// they are PyTorch's own products and sums, the fewest that do, called from here. Larger ones go to
// `triton_kernels/`, whose launchers are the ops `tiled_<op>`; without Triton to the reference.
// Sizes are where an H200 and its host cross over (bench/README.md).
// What is done here is `small_<op>`, on any device and of any size: for tests and benches.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "../check.h"

namespace ekfac_fast::cuda {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using MaybeOrder = std::optional<c10::string_view>;

// Numbers that a call writes beside its result, or a piece of it.
constexpr int64_t kNumbers = int64_t{17} << 20;
// Numbers that are written and read three times, where a launch of ours keeps them on the chip:
// squares of 16-bit gradients whose tiles are not mostly padding, products with factors.
constexpr int64_t kReread = int64_t{12} << 20, kTile = 128;
// Gradients that meet several queries: of as many bytes one product is faster than any strips.
constexpr int64_t kFormedBytes = int64_t{256} << 20;
constexpr int64_t kFewQueries = 2;
// A product of odd width that takes longer than the copy of a matrix which mends it.
constexpr int64_t kOddFlops = 1'000'000'000;
// Covariances that take as long as two launches of ours; tensor cores make no fp32 products.
constexpr int64_t kFlops = 100'000'000'000, kFp32Flops = 8'000'000'000;
// Programs that run at once, and rows of each, where one launch is the whole op (`narrow.py`).
constexpr int64_t kProcessors = 132, kRows = 64;

bool is_fp32(const Tensor& x) { return x.scalar_type() == at::kFloat; }

// Products whose result is fp32 whatever the operands: cuBLAS has them, CPUs' libraries have not.
Tensor product(const Tensor& x, const Tensor& y) {
  if (is_fp32(x)) return x.dim() == 3 ? at::bmm(x, y) : at::mm(x, y);
  if (!x.is_cuda()) return at::matmul(x.to(at::kFloat), y.to(at::kFloat));
  return x.dim() == 3 ? at::bmm(x, y, at::kFloat) : at::mm(x, y, at::kFloat);
}

// sum += x y.
void add_product(Tensor& sum, const Tensor& x, const Tensor& y) {
  if (is_fp32(x)) {
    sum.addmm_(x, y);
  } else if (!x.is_cuda()) {
    sum.add_(product(x, y));
  } else {
    at::addmm_out(sum, sum, x, y, at::kFloat);
  }
}

// Layers with a bias are of odd width, which cuBLAS multiplies at a fourth of its rate, however the
// rows lie: products are made of rows up to this width, and what is beyond is left out of them.
// (Where what is multiplied has odd rows, too, that mends nothing.)
int64_t even(int64_t F) { return F % 8 == 0 ? F : (F + 15) / 16 * 16; }

// x [B,T,I] with its ones, [B,T,I + 1], and whatever is in memory up to an even width.
Tensor with_ones(const Tensor& x) {
  const int64_t I = x.size(2);
  const Tensor rows = at::empty({x.size(0), x.size(1), even(I + 1)}, x.options());
  rows.narrow(2, 0, I).copy_(x);
  rows.select(2, I).fill_(1);
  return rows;
}

// Rows (b, t), a view where x has them so.
Tensor flat(const Tensor& x) { return x.flatten(0, 1); }

// (x, 1) Q of every row, the ones only with a bias; [B,T,J] up to an even width.
Tensor rotated(const Tensor& x, Tensor Q, bool bias) {
  const int64_t F = x.size(2), J = Q.size(1), width = even(J);
  const Tensor y = at::empty({x.size(0), x.size(1), width}, x.options());
  Tensor rows = flat(y);
  const bool mends = width > J && F % 8 == 0 && x.element_size() == 2;
  if (mends && 2 * rows.size(0) * F * J >= kOddFlops) {
    const Tensor wide = at::empty({Q.size(0), width}, Q.options());
    wide.narrow(1, 0, J).copy_(Q);
    Q = wide;
  } else {
    rows = rows.narrow(1, 0, J);
  }
  bias ? at::addmm_out(rows, Q.select(0, F), flat(x), Q.narrow(0, 0, F))
       : at::mm_out(rows, flat(x), Q);
  return y;
}

// Both sides of sequences' gradients, and what is still to be rotated: on the gradient.
struct Sides {
  Tensor g, a;  // [B,T,O] and [B,T,I], or [B,T,J] where `a` is rotated; up to an even width
  MaybeTensor Qg, Qa;
  bool bias;  // whether the ones are still to come
};

// Both rotated by tokens, where that costs less.
Sides rotated_sides(const Tensor& g, const Tensor& a, const MaybeTensor& Qg, const MaybeTensor& Qa,
                    bool bias, const Letters& size, const MaybeOrder& forced) {
  const Order by_tokens = contraction_order(size, forced);
  Sides sides{g, a, Qg, Qa, bias};
  if (Qg && by_tokens.g_tokens) {
    sides.g = rotated(g, *Qg, false);
    sides.Qg.reset();
  }
  if (Qa && by_tokens.a_tokens) {
    sides.a = rotated(a, *Qa, bias);
    sides.Qa.reset();
    sides.bias = false;
  }
  return sides;
}

// What a launcher is called with; `whole`: it rotates, too. Here that costs a host half as much.
Sides launched_sides(bool whole, const Tensor& g, const Tensor& a, const MaybeTensor& Qg,
                     const MaybeTensor& Qa, bool bias, const Letters& size,
                     const MaybeOrder& order) {
  if (whole) return {g, a, Qg, Qa, bias};
  Sides sides = rotated_sides(g, a, Qg, Qa, bias, size, order);
  sides.g = sides.g.narrow(2, 0, size.O);
  sides.a = sides.a.narrow(2, 0, size.J - sides.bias);
  return sides;
}

// Qg^T G_b Qa of every sequence in fp32, [B,O,J].
Tensor gradients(const Tensor& g, const Tensor& a, const MaybeTensor& Qg, const MaybeTensor& Qa,
                 bool bias, const Letters& size, const MaybeOrder& forced) {
  const Sides sides = rotated_sides(g, a, Qg, Qa, bias, size, forced);
  const Tensor x = sides.g, y = sides.bias ? with_ones(sides.a) : sides.a;
  if (!sides.Qg && !sides.Qa) {
    return product(x.mT(), y).narrow(1, 0, size.O).narrow(2, 0, size.J);
  }
  Tensor G = at::bmm(x.narrow(2, 0, size.O).mT(), y.narrow(2, 0, size.J));
  if (sides.Qg && sides.Qa) G = at::matmul(G, *Qa);
  if (sides.Qg) return product(Qg->mT().expand({size.B, size.O, size.O}), G);
  return product(flat(G), *Qa).view({size.B, size.O, size.J});
}

// fp64 serves validation: the reference's.
bool wide(const Tensor& operand) { return operand.scalar_type() == at::kDouble; }

bool small_gradients(const Letters& size) { return size.B * size.O * size.J <= kNumbers; }

bool small_squares(const Tensor& g, const Letters& size) {
  const auto padded = [](int64_t F) { return (F + kTile - 1) / kTile * kTile; };
  const bool fit = 5 * padded(size.O) * padded(size.J) <= 6 * size.O * size.J;
  const bool fewer = fit && !is_fp32(g);
  return size.B * size.O * size.J <= (fewer ? kReread : kNumbers);
}

// Whether `narrow.py` makes one launch of a call that divides; `config` there is exact.
bool in_one_launch(const Tensor& g, const MaybeTensor& Qg, const MaybeTensor& Qa,
                   const Letters& size, const MaybeOrder& order) {
  if (is_fp32(g) || !Qg || !Qa || order) return false;
  const auto [lower, upper] = std::minmax(size.O, size.I);
  const int64_t T = size.T, X = size.O >= size.I ? size.O : size.J;
  const int64_t Y = size.O >= size.I ? size.J : size.O;
  const int64_t here = T * X * X + T * X * Y + X * Y * Y;
  const int64_t least = X * X * std::min(T, Y) + T * X * Y + Y * Y * std::min(T, X);
  return upper <= 512 && lower <= 256 && here <= 4 * least &&
         size.B * ((X + kRows - 1) / kRows) <= kProcessors;
}

// An op for calls that are not small: Triton's launcher, or the reference.
template <class Signature>
class Larger {
 public:
  explicit Larger(const std::string& op) : Larger(find("tiled_" + op), find(op)) {}

  template <class... Args>
  auto operator()(Args&&... args) const {
    return op_.redispatch(c10::DispatchKeySet(key_), std::forward<Args>(args)...);
  }

 private:
  using Found = std::optional<c10::OperatorHandle>;

  static Found find(const std::string& op) {
    return c10::Dispatcher::singleton().findSchema({"ekfac_fast::" + op, ""});
  }
  Larger(const Found& tiled, const Found& op)
      : op_((tiled ? tiled : op).value().template typed<Signature>()),
        key_(tiled ? c10::DispatchKey::CUDA : c10::DispatchKey::CompositeExplicitAutograd) {}

  c10::TypedOperatorHandle<Signature> op_;
  c10::DispatchKey key_;
};

// Each op twice: `kAlways` is `small_<op>`.

template <bool kAlways>
void covariance(Tensor& cov, const Tensor& x, const MaybeTensor& mask, bool bias) {
  const Letters size = check("covariance", "cov[J,J] x[N,I] mask[N]", {cov, x, mask}, bias);
  if (!kAlways &&
      (wide(x) || bias || 2 * size.N * size.I * size.I >= (is_fp32(x) ? kFp32Flops : kFlops))) {
    static const Larger<decltype(covariance<kAlways>)> larger("covariance");
    return larger(cov, x, mask, bias);
  }
  if (size.N == 0) return;
  Tensor rows = bias ? with_ones(x.unsqueeze(0)).squeeze(0).narrow(1, 0, size.J) : x;
  if (mask) rows = at::where(mask->to(at::kBool).unsqueeze(1), rows, 0);
  add_product(cov, rows.t(), rows);
}

template <bool kAlways>
void eigenvalues(Tensor& lam_sum, const Tensor& g, const Tensor& a, const MaybeTensor& Qg,
                 const MaybeTensor& Qa, bool bias, MaybeOrder order) {
  const Letters size = check("eigenvalues", "lam_sum[O,J] g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J]",
                             {lam_sum, g, a, Qg, Qa}, bias, 0.0, order);
  if (!kAlways && (wide(g) || !small_squares(g, size))) {
    static const Larger<decltype(eigenvalues<kAlways>)> larger("eigenvalues");
    const Sides x = launched_sides(wide(g), g, a, Qg, Qa, bias, size, order);
    return larger(lam_sum, x.g, x.a, x.Qg, x.Qa, x.bias, order);
  }
  if (g.numel() == 0) return;
  const Tensor G = gradients(g, a, Qg, Qa, bias, size, order);
  if (size.B == 1) {
    lam_sum.addcmul_(G[0], G[0]);
  } else {
    lam_sum.add_(G.square_().sum(0));
  }
}

template <bool kAlways>
Tensor precondition(const Tensor& g, const Tensor& a, const MaybeTensor& Qg, const MaybeTensor& Qa,
                    const Tensor& lam, double damping, bool bias, MaybeOrder order) {
  const Letters size = check("precondition", "g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J] lam[O,J]",
                             {g, a, Qg, Qa, lam}, bias, damping, order);
  const bool whole = wide(g) || in_one_launch(g, Qg, Qa, size, order);
  if (!kAlways && (whole || !small_gradients(size))) {
    static const Larger<decltype(precondition<kAlways>)> larger("precondition");
    const Sides x = launched_sides(whole, g, a, Qg, Qa, bias, size, order);
    return larger(x.g, x.a, x.Qg, x.Qa, lam, damping, x.bias, order);
  }
  if (g.numel() == 0) return at::zeros({size.B, size.O, size.J}, lam.options());
  const Tensor G = gradients(g, a, Qg, Qa, bias, size, order), damped = lam.add(damping);
  return G.is_contiguous() ? G.div_(damped) : G.div(damped);
}

template <bool kAlways>
void self_influence(Tensor& s, const Tensor& g, const Tensor& a, const MaybeTensor& Qg,
                    const MaybeTensor& Qa, const Tensor& lam, double damping, bool bias,
                    MaybeOrder order) {
  const Letters size = check("self_influence", "s[B] g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J] lam[O,J]",
                             {s, g, a, Qg, Qa, lam}, bias, damping, order);
  const bool whole = wide(g) || in_one_launch(g, Qg, Qa, size, order);
  if (!kAlways && (whole || !small_squares(g, size))) {
    static const Larger<decltype(self_influence<kAlways>)> larger("self_influence");
    const Sides x = launched_sides(whole, g, a, Qg, Qa, bias, size, order);
    return larger(s, x.g, x.a, x.Qg, x.Qa, lam, damping, x.bias, order);
  }
  if (g.numel() == 0) return;
  const Tensor G = gradients(g, a, Qg, Qa, bias, size, order);
  s.add_(G.square_().div_(lam.add(damping)).sum({1, 2}));
}

// s[q,b,t] += (g_bt P_q) . (a_bt, 1), or summed over tokens: rows (b, t) by some queries at a time.
void by_tokens(Tensor& s, const Tensor& P, const Tensor& g, const Tensor& x, const Letters& size) {
  const int64_t N = size.B * size.T;
  const int64_t room = std::max<int64_t>(1, kNumbers / (N * size.J));
  const int64_t pieces = (size.Q + room - 1) / room, some = (size.Q + pieces - 1) / pieces;
  for (int64_t q = 0; q < size.Q; q += some) {
    const int64_t queries = std::min(some, size.Q - q);
    Tensor H = product(flat(g).expand({queries, N, size.O}), P.narrow(0, q, queries));
    H = H.view({queries, size.B, size.T, size.J}).mul_(x);
    s.narrow(0, q, queries).add_(s.dim() == 3 ? H.sum(-1) : H.sum({2, 3}));
  }
}

template <bool kAlways>
void dense_scores(Tensor& s, const Tensor& P, const Tensor& g, const Tensor& a, bool bias) {
  const Letters size =
      check("dense_scores", "s[Q,B]|[Q,B,T] P[Q,O,J] g[B,T,O] a[B,T,I]", {s, P, g, a}, bias);
  const int64_t G = size.B * size.O * size.J, met = size.Q * size.T, itemsize = g.element_size();
  const bool per_token = s.dim() == 3;
  const bool formed = size.Q > kFewQueries ? G * itemsize <= kFormedBytes : G <= kNumbers;
  // Where products of few tokens and queries are a small part of the gradients.
  const bool few = G > kNumbers && met <= (is_fp32(g) ? 32 : 128) && 8 * met <= itemsize * size.O;
  // Per token cuBLAS is as fast in fp32, for inputs narrower than a tile, and where P is copied.
  const bool here = per_token ? is_fp32(g) || (size.J <= kRows && size.O >= 8 * size.J) ||
                                    (bias && met * size.B * size.J <= kNumbers / 8)
                              : few || formed;
  if (!kAlways && (wide(g) || !here)) {
    static const Larger<decltype(dense_scores<kAlways>)> larger("dense_scores");
    return larger(s, P, g, a, bias);
  }
  if (s.numel() == 0 || g.numel() == 0) return;
  const Tensor x = bias ? with_ones(a) : a, exact = x.narrow(2, 0, size.J);
  if (per_token || few) return by_tokens(s, P, g, exact, size);
  // Of odd width G is copied: P has no room between its rows.
  const bool copied = itemsize == 2 && 2 * G * size.T >= kOddFlops;
  const Tensor every = at::bmm(g.mT(), copied ? x : exact).narrow(2, 0, size.J);
  add_product(s, P.flatten(1), every.flatten(1).t());
}

template <bool kAlways>
void low_rank_scores(Tensor& s, const Tensor& L, const Tensor& R, const Tensor& g, const Tensor& a,
                     bool bias) {
  const Letters size =
      check("low_rank_scores", "s[Q,B]|[Q,B,T] L[Q,O,K] R[Q,K,J] g[B,T,O] a[B,T,I]",
            {s, L, R, g, a}, bias);
  const int64_t columns = size.Q * size.K;
  if (!kAlways && (wide(g) || size.B * size.T * columns > kReread)) {
    static const Larger<decltype(low_rank_scores<kAlways>)> larger("low_rank_scores");
    return larger(s, L, R, g, a, bias);
  }
  if (s.numel() == 0 || size.K == 0 || size.T == 0) return;
  const Tensor left = L.permute({1, 0, 2}).reshape({size.O, columns});
  const Tensor right = R.reshape({columns, size.J}), inputs = right.narrow(1, 0, size.I).t();
  const Tensor last = bias ? right.select(1, size.I) : Tensor();
  Tensor U, V;
  if (g.scalar_type() == at::kHalf) {
    U = product(flat(g), left);
    V = product(flat(a), inputs);
    if (bias) V.add_(last);
  } else {  // bf16 has the range for it: half of what is written and read again
    U = at::mm(flat(g), left);
    V = bias ? at::addmm(last, flat(a), inputs) : at::mm(flat(a), inputs);
  }
  const Tensor terms = V.mul_(U).view({size.B, size.T, size.Q, size.K});
  if (s.dim() == 3) {
    s.add_(terms.sum(-1, false, s.scalar_type()).permute({2, 0, 1}));
  } else {
    s.add_(terms.sum({1, 3}, false, s.scalar_type()).t());
  }
}

}  // namespace
}  // namespace ekfac_fast::cuda

TORCH_LIBRARY_IMPL(ekfac_fast, CUDA, m) {
  using namespace ekfac_fast::cuda;
  m.impl("covariance", &covariance<false>);
  m.impl("eigenvalues", &eigenvalues<false>);
  m.impl("precondition", &precondition<false>);
  m.impl("self_influence", &self_influence<false>);
  m.impl("dense_scores", &dense_scores<false>);
  m.impl("low_rank_scores", &low_rank_scores<false>);
}

TORCH_LIBRARY_FRAGMENT(ekfac_fast, m) {
  using namespace ekfac_fast::cuda;
  m.def("small_covariance", &covariance<true>);
  m.def("small_eigenvalues", &eigenvalues<true>);
  m.def("small_precondition", &precondition<true>);
  m.def("small_self_influence", &self_influence<true>);
  m.def("small_dense_scores", &dense_scores<true>);
  m.def("small_low_rank_scores", &low_rank_scores<true>);
}
