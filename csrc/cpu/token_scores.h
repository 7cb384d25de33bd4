// s_qn += g_n^T P_q (a_n, 1): dense scores token by token, no gradient made.
#pragma once

#include "../check.h"

namespace ekfac_fast::cpu {

// s [Q,B,T] and the other arguments of `dense_scores`, checked.
void token_scores(const at::Tensor& s, const at::Tensor& P, const at::Tensor& g,
                  const at::Tensor& a, bool bias, const Letters& size);

}  // namespace ekfac_fast::cpu
