"""What a call does to its scores beside the mask: `Scores`, and what makes one. It needs torch alone."""

from anymask.scores.bias import Bias as Bias
from anymask.scores.builders import alibi as alibi
from anymask.scores.builders import from_score_mod as from_score_mod
from anymask.scores.builders import low_rank as low_rank
from anymask.scores.builders import relative as relative
from anymask.scores.builders import relative_2d as relative_2d
from anymask.scores.builders import relative_buckets as relative_buckets
from anymask.scores.record import Lookup as Lookup
from anymask.scores.record import Needs as Needs
from anymask.scores.record import ScoreGrads as ScoreGrads
from anymask.scores.record import Scores as Scores
from anymask.scores.resolve import resolve as resolve
