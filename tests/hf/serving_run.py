"""An engine serves adapters, in a process and perhaps a Python of its own: ``serving_run.py ENGINE ROOT FORM...``.

ROOT holds prompts.npy, [n, t] token ids, and base/ with a folder for each FORM (vLLM), or base.gguf with a FORM.gguf
for each (llama.cpp). Writes logprobs.npz with an array [n, t, vocabulary] for each form and for ``base``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

VOCABULARY = 64


def vllm(root: Path, prompts: np.ndarray, forms: list[str]) -> dict[str, np.ndarray]:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no processes that outlive this one
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = LLM(
        str(root / "base"),
        dtype="float32",
        enforce_eager=True,  # compiles nothing
        enable_lora=True,
        max_lora_rank=8,
        max_model_len=64,
        max_logprobs=VOCABULARY,
        gpu_memory_utilization=0.2,
    )
    # Every beginning of a prompt: logprobs of prompts themselves do not go with LoRA.
    starts = [{"prompt_token_ids": row[: end + 1].tolist()} for row in prompts for end in range(len(row))]
    ask = SamplingParams(temperature=0, max_tokens=1, logprobs=VOCABULARY)

    def logprobs(request: LoRARequest | None) -> np.ndarray:
        answers = model.generate(starts, ask, lora_request=request, use_tqdm=False)
        rows = [answer.outputs[0].logprobs[0] for answer in answers]  # token -> its log probability
        found = [[row[token].logprob for token in range(VOCABULARY)] for row in rows]
        return np.array(found).reshape(*prompts.shape, -1)

    requests = {form: LoRARequest(form, index, str(root / form)) for index, form in enumerate(forms, 1)}
    return {"base": logprobs(None)} | {form: logprobs(request) for form, request in requests.items()}


def llama_cpp(root: Path, prompts: np.ndarray, forms: list[str]) -> dict[str, np.ndarray]:
    from llama_cpp import GGML_TYPE_F32, Llama

    found = {}
    for form in ["base", *forms]:
        lora = None if form == "base" else str(root / f"{form}.gguf")
        model = Llama(
            str(root / "base.gguf"),
            lora_path=lora,
            n_ctx=64,
            n_threads=1,
            logits_all=True,
            type_k=GGML_TYPE_F32,  # keys and values are float16 by default
            type_v=GGML_TYPE_F32,
            verbose=False,
        )
        rows = []
        for row in prompts:
            model.reset()
            model.eval(row.tolist())
            rows.append(np.array(model.scores[: len(row)], dtype=np.float64))
        logits = np.stack(rows)
        logits -= logits.max(-1, keepdims=True)
        found[form] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


if __name__ == "__main__":
    engine, root = {"vllm": vllm, "llama_cpp": llama_cpp}[sys.argv[1]], Path(sys.argv[2])
    np.savez(root / "logprobs.npz", **engine(root, np.load(root / "prompts.npy"), sys.argv[3:]))
