"""What a call does to its scores beside the mask: `Scores`, and what makes one. It needs torch alone."""

from anymask.scores.record import Lookup as Lookup
from anymask.scores.record import Needs as Needs
from anymask.scores.record import ScoreGrads as ScoreGrads
from anymask.scores.record import Scores as Scores
