"""Train steps with LLaMA-Factory for `benchmarks.studies.llamafactory`.

The Python that LLaMA-Factory is installed for runs this; nothing of this project is imported. The
model, LoRA, packing, collator and trainer are LLaMA-Factory's own, made as its `run_sft` makes
them. A line on stdin has a variant and examples as tokens and labels. One optimizer step is made of
them, and its seconds are a line on stdout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from datasets import Dataset

if not importlib.util.find_spec(
    "torchaudio"
):  # imported by LLaMA-Factory's readers of sound; its wheels need CUDA
    sys.modules["torchaudio"] = importlib.util.module_from_spec(ModuleSpec("torchaudio", None))

from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer
from llamafactory.data.processor import PackedSupervisedDatasetProcessor
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer


class Packing(PackedSupervisedDatasetProcessor):  # type: ignore[misc]
    """Pack examples that are tokens already, as LLaMA-Factory does."""

    def _encode_data_example(
        self, prompt: Any, response: Any, **_: Any
    ) -> tuple[list[int], list[int]]:
        return prompt[0], response[0]


def main() -> None:
    """Serve steps until stdin ends."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    given = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as scratch:
        steps = {variant: build(given, variant, scratch) for variant in given["variants"]}
        print("ready", file=told, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(steps[asked["variant"]](asked["examples"])), file=told, flush=True)


def build(given: dict[str, Any], variant: str, scratch: str) -> Any:
    """Return the step of a variant: `plain` or `packing`.

    Its neat_packing keeps examples apart.
    """
    packed = variant == "packing"
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(
        {
            "model_name_or_path": given["model"],
            "template": "smollm2",
            "stage": "sft",
            "do_train": True,
            "dataset": "given",  # examples come as tokens: never opened
            "output_dir": scratch,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": given["rank"],
            "lora_alpha": given["alpha"],
            "lora_dropout": given["dropout"],
            "quantization_bit": 4,
            "double_quantization": False,
            "flash_attn": "sdpa",
            "disable_gradient_checkpointing": True,
            "bf16": given["bf16"],
            "use_cpu": True,
            "cutoff_len": given["packed_length"],
            "packing": packed,
            "neat_packing": packed,
            "per_device_train_batch_size": 1,
            "report_to": "none",
        }
    )
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    model = load_model(module["tokenizer"], model_args, finetuning_args, is_trainable=True)
    collate = SFTDataCollatorWith4DAttentionMask(
        template=template,
        model=model,
        pad_to_multiple_of=8,
        label_pad_token_id=-100,
        block_diag_attn=model_args.block_diag_attn,
        neat_packing=data_args.neat_packing,
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        compute_dtype=model_args.compute_dtype,
        **module,
    )
    nothing = Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]})
    trainer = CustomSeq2SeqTrainer(
        model=model,
        args=training_args,
        finetuning_args=finetuning_args,
        data_collator=collate,
        train_dataset=nothing,
        **module,
    )
    packing = Packing(template=template, data_args=data_args, **module)
    model = trainer.accelerator.prepare_model(model)
    optimizer = torch.optim.AdamW(
        [w for w in model.parameters() if w.requires_grad], lr=1e-5, fused=True
    )

    def step(examples: list[dict[str, list[int]]]) -> dict[str, float]:
        features = (
            pack(packing, examples)
            if packed
            else [{**e, "attention_mask": [1] * len(e["input_ids"])} for e in examples]
        )
        labelled = torch.tensor(
            sum(sum(token != -100 for token in e["labels"][1:]) for e in examples)
        )
        started = time.perf_counter()
        losses = [
            trainer.training_step(model, collate([each]), num_items_in_batch=labelled)
            for each in features
        ]
        optimizer.step()
        optimizer.zero_grad()
        return {
            "seconds": time.perf_counter() - started,
            "loss": float(sum(losses)),
            "passes": len(features),
        }

    return step


def pack(packing: Packing, examples: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """Return rows of up to `cutoff_len` tokens."""
    nothing = [None] * len(examples)
    columns = packing.preprocess_dataset(
        {
            "_prompt": [[example["input_ids"]] for example in examples],
            "_response": [[example["labels"]] for example in examples],
            **dict.fromkeys(("_system", "_tools", "_images", "_videos", "_audios"), nothing),
        }
    )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1"}
    main()
