"""Official metrics of downstream tasks, on the host: texts and similarities in, figures out."""

from vlp_jax.evals.scores.captioning import caption_scores
from vlp_jax.evals.scores.glue import glue_score, glue_scores
from vlp_jax.evals.scores.retrieval import DotProducts, retrieval_ranks, retrieval_scores
from vlp_jax.evals.scores.vqa import vqa_accuracy

__all__ = [
    "DotProducts",
    "caption_scores",
    "glue_score",
    "glue_scores",
    "retrieval_ranks",
    "retrieval_scores",
    "vqa_accuracy",
]
