"""The section `teacher`: the model whose log-probabilities the policy learns from."""

from pydantic import Field, model_validator

from uniapl.config.section import PathText, Section


class TeacherConfig(Section):
    """The teacher of objective.teacher_kl: a local model or a vLLM server, with the policy's tokenizer."""

    model_name_or_path: PathText | None = None
    """Directory or Hub id of the teacher, which runs in the training process and is not trained."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub model; null uses the default branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    url: str | None = None
    """URL of a `vllm serve` that serves the teacher, http://host:port, in place of a local model. Its
    log-probabilities are at temperature 1."""
    top_k: int = Field(default=0, ge=0)
    """Compare policy and teacher on the teacher's k most likely tokens at each position, all others together
    as one; 0 compares only the sampled token. vLLM's own limit is 20 (--max-logprobs)."""
    timeout: float = Field(default=60.0, gt=0)
    """Timeout of one request to the server, in seconds."""
    max_retries: int = Field(default=3, ge=0)
    """Retries of a failed request before the run ends; 0 never retries."""

    @model_validator(mode="after")
    def _one_teacher(self) -> "TeacherConfig":
        if self.url and self.model_name_or_path:
            raise ValueError("set model_name_or_path (a local model) or url (a server), not both")
        return self
