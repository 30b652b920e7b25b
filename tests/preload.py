"""What the fork server imports, once for all processes that it starts, and spaCy's model, loaded once."""
import conftest  # noqa: F401
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

import rewards

rewards.spacy_model()
