"""torchtitan's smallest Llama, watched: the one line is `watched(...)`.

With torchtitan's own launcher, `llama3_watched` goes into a config_registry. Random tokens stand
for a data set here, so that nothing has to be downloaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import TrainingConfig
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.tools.logging import init_logger

from foreshock.monitor.integrations.torchtitan import watched


class RandomTokens(BaseDataLoader):
    """Batches of tokens, each as likely as any other."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, **job: Any) -> None:
        self.shape = job["local_batch_size"], job["seq_len"] + 1
        self.generator = torch.Generator().manual_seed(job["dp_rank"])

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            tokens = torch.randint(64, self.shape, generator=self.generator)
            positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
            yield {"input": tokens[:, :-1], "positions": positions}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is."""
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there."""
        self.generator.set_state(state_dict["state"])


class NoText(BaseTokenizer):
    """There is no text to take apart."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to choose."""

    __init__ = encode = decode = get_vocab_size = lambda self, *_, **__: None


def llama3_watched() -> Any:
    """The debug model for 24 steps."""
    config = llama3_debugmodel()
    config.tokenizer, config.dataloader = NoText.Config(), RandomTokens.Config()
    config.training = TrainingConfig(local_batch_size=2, seq_len=32, steps=24)
    config.validator.enable = config.checkpoint.enable = False
    return watched(config, run="torchtitan-llama")


if __name__ == "__main__":
    init_logger()
    trainer = llama3_watched().build()
    trainer.train()
    trainer.close()
