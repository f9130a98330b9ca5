"""Train a small Llama on the standard library: how a model like ``examples/pylm`` is made.

    python examples/train_pylm.py --out out/pylm --steps 20000 --device cuda

Trains a byte-level BPE tokenizer, then the model, and saves both as a Hugging Face folder that
``llmc compile`` takes. The modules that ``make_text.py`` puts into its held-out text are left out
of both, so that text is unseen by a model trained here.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_text import is_heldout, library_files

END = "<|endoftext|>"


def training_sources(limit: int | None = None) -> list[str]:
    """The standard library's source files that are not held out; at most ``limit`` of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in library_files(root) if not is_heldout(path)]
    return [(root / path).read_text(encoding="utf-8", errors="replace") for path in files[:limit]]


def train_tokenizer(sources: list[str], vocabulary: int):
    """A byte-level BPE of ``vocabulary`` tokens as a transformers tokenizer; ``END`` is 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(sources, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END
    )


def build_model(vocabulary: int, width: int, blocks: int, context: int):
    """A Llama: tied embeddings, heads of 32, two query heads per KV head, MLP of 3 x width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if width % 64:
        raise SystemExit(f"expected --width to be a multiple of 64, found {width}")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        max_position_embeddings=context,
        rms_norm_eps=1e-6,
        initializer_range=0.03,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps (at most 200), then a cosine to ``peak`` / 10."""
    warm = max(1, min(200, steps // 20))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(model, stream: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """Train ``model`` in place on windows of ``stream`` [tokens]; returns the loss of each step.

    AdamW with weight decay on matrices only, gradients clipped to norm 1, bf16 autocast on a GPU.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    draw = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(args.context)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        first = torch.randint(len(stream) - args.context + 1, (args.batch, 1), generator=draw)
        window = stream[first + offsets].to(args.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device.startswith("cuda")):
            logits = model(window).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == args.steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step:>6}  loss {losses[-1]:.4f}  {seconds:.0f} s", file=sys.stderr)
    return losses


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; the defaults give the shape of ``examples/pylm``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to save the model in")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--files", type=int, default=None, help="read at most this many modules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[float]:
    """Train and save; returns the losses."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    sources = training_sources(args.files)
    tokenizer = train_tokenizer(sources, args.vocabulary)
    stream = torch.tensor(tokenizer.encode(END.join(sources)))
    if len(stream) < args.context:
        raise SystemExit(
            f"expected at least {args.context} tokens of text, found {len(stream)}; raise --files"
        )
    model = build_model(len(tokenizer), args.width, args.blocks, args.context).to(args.device)
    print(f"{len(stream)} tokens, {model.num_parameters()} parameters", file=sys.stderr)
    losses = train(model, stream, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(args.out)
    return losses


if __name__ == "__main__":
    main()
