"""The step of the online softmax, and the log-sum-exp that it ends in."""

import triton
import triton.language as tl


@triton.jit
def softmax_step(s, m_i, l_i, acc, qk_scale):
    """Equation (3) of docs/kernels.md: fold scores `s` into the running maximum, sum and output; returns p too."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
    # a row with no key yet has m = -inf, and -inf - -inf would be NaN
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.math.exp2(s * qk_scale - m_safe[:, None])
    alpha = tl.math.exp2(m_i - m_safe)
    return p, m_new, l_i * alpha + tl.sum(p, 1), acc * alpha[:, None]
