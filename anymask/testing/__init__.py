"""What tests, benchmarks and users check with: masks by name, inputs, an fp64 oracle, and the one rule for errors.

    check(Case("documents", q_len=239, kv_len=239, dtype=torch.float16))

runs `attention` forward and backward and compares o, lse, dq, dk, dv with dense fp64 attention. The oracle is written
here, apart from `anymask.backends.reference`, so that it checks that one too.
"""

from anymask.testing import properties as properties
from anymask.testing.builders import BUILDERS as BUILDERS
from anymask.testing.cases import DTYPE_NAMES as DTYPE_NAMES
from anymask.testing.cases import Case as Case
from anymask.testing.cases import Inputs as Inputs
from anymask.testing.cases import check as check
from anymask.testing.cases import judge_of as judge_of
from anymask.testing.cases import make_inputs as make_inputs
from anymask.testing.cases import run as run
from anymask.testing.expressions import make_mask as make_mask
from anymask.testing.masks import MASKS as MASKS
from anymask.testing.masks import NamedMask as NamedMask
from anymask.testing.oracle import LAYOUTS as LAYOUTS
from anymask.testing.oracle import Results as Results
from anymask.testing.oracle import attend as attend
from anymask.testing.oracle import eager as eager
from anymask.testing.oracle import magnitudes as magnitudes
from anymask.testing.oracle import make_qkv as make_qkv
from anymask.testing.oracle import reference as reference
from anymask.testing.rules import RECORDS as RECORDS
from anymask.testing.rules import Judge as Judge
from anymask.testing.rules import Record as Record
from anymask.testing.rules import assert_matches as assert_matches
from anymask.testing.rules import assert_same_block_mask as assert_same_block_mask
from anymask.testing.rules import assert_unused_is_zero as assert_unused_is_zero
