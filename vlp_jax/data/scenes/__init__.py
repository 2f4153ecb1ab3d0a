"""A procedural image-text world: pictures, captions, questions and masks as pure functions."""

from vlp_jax.data.scenes.labels import ScenesLabels as ScenesLabels
from vlp_jax.data.scenes.questions import ANSWERS as ANSWERS
from vlp_jax.data.scenes.questions import KINDS as KINDS
from vlp_jax.data.scenes.questions import Question as Question
from vlp_jax.data.scenes.source import Scenes as Scenes
from vlp_jax.data.scenes.statements import LABELS as LABELS
from vlp_jax.data.scenes.statements import Hypothesis as Hypothesis
from vlp_jax.data.scenes.statements import Statement as Statement
from vlp_jax.data.scenes.tasks import ScenesEntailment as ScenesEntailment
from vlp_jax.data.scenes.tasks import ScenesNLVR2 as ScenesNLVR2
from vlp_jax.data.scenes.tasks import ScenesVQA as ScenesVQA
from vlp_jax.data.scenes.words import VOCABULARY as VOCABULARY
from vlp_jax.data.scenes.world import COLOURS as COLOURS
from vlp_jax.data.scenes.world import HELD_OUT as HELD_OUT
from vlp_jax.data.scenes.world import LEVELS as LEVELS
from vlp_jax.data.scenes.world import MAX_COUNT as MAX_COUNT
from vlp_jax.data.scenes.world import SHAPES as SHAPES
from vlp_jax.data.scenes.world import SIZES as SIZES
from vlp_jax.data.scenes.world import SPLITS as SPLITS
from vlp_jax.data.scenes.world import TEXTURES as TEXTURES
