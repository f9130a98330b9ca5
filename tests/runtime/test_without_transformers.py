"""An artefact runs and is judged where transformers cannot be imported at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.data import Stream, Tokenizer
from llmc.compiler.runtime.artefact import Contents, save
from llmc.compiler.runtime.evaluate import evaluate
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.generate import generate

CODE = textwrap.dedent(
    """
    import json, sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("transformers", "triton", "huggingface_hub"):
                raise ImportError(f"{name} is blocked by the test")

    sys.meta_path.insert(0, Block())
    from llmc.compiler.pipeline.data import Tokenizer, read_stream
    from llmc.compiler.runtime.artefact import load
    from llmc.compiler.runtime.cache import add_cache
    from llmc.compiler.runtime.evaluate import evaluate
    from llmc.compiler.runtime.executor import Runner
    from llmc.compiler.runtime.generate import generate

    folder, text, prompt = sys.argv[1:]
    got = load(folder)
    tokenizer = Tokenizer(got.tokenizer)
    stream = read_stream(text, tokenizer)
    result = evaluate(Runner(got.program), stream, 128, limit=4, batch=4)
    runner = Runner(add_cache(got.program))
    new = generate(runner, [tokenizer.encode(prompt)], max_new_tokens=8, eos=tokenizer.eos)
    loaded = sorted({m.split(".")[0] for m in sys.modules} & {"transformers", "triton"})
    print(json.dumps([result.perplexity, new[0], loaded]))
    """
)


def test_run_and_eval_need_no_transformers(
    pylm_program: Program,
    pylm_runner: Runner,
    pylm: Path,
    pylm_text: Path,
    pylm_tokenizer: Tokenizer,
    heldout: Stream,
    tmp_path: Path,
) -> None:
    save(tmp_path / "out", Contents(pylm_program, tokenizer=pylm))
    prompt = "import os\n\ndef main("
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "out", pylm_text / "heldout.txt", prompt],
        check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    perplexity, new, loaded = json.loads(done.stdout)
    want = evaluate(pylm_runner, heldout, 128, limit=4, batch=4)
    assert abs(perplexity - want.perplexity) < 1e-3 * want.perplexity
    assert new == generate(pylm_runner, [pylm_tokenizer.encode(prompt)], max_new_tokens=8)[0]
    assert loaded == []
