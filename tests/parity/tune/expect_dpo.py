"""Makes tests/golden/tune/llama/dpo.json: 50 steps of TRL's DPOTrainer on the tiny model, in f32.

expect_dpo.py tests/golden/tune/llama

Every step takes all rows, so their order does not matter. The adapter begins as start/ has it, with
B = 0. Rows are plain text: TRL appends EOS to both answers.
"""
import json
import pathlib
import sys
import tempfile

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

ROWS = [{"prompt": f"say {i}:", "chosen": w * (1 + i % 3), "rejected": w[::-1] * (1 + i % 2) + "!"}
        for i, w in enumerate(["one", "seven", "the end", "an", "there", "x", "hat in", "tin"])]
RUNS = {"sigmoid": dict(loss_type=["sigmoid"], loss_weights=[1.0], beta=0.3),
        "ipo": dict(loss_type=["ipo"], loss_weights=[1.0], beta=0.5),
        "rpo": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.1)}
NAMES = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
         "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
         "entropy", "mean_token_accuracy"]

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.chat_template = None
out = {"lr": 2e-3, "rows": ROWS, "runs": {}}
for name, kwargs in RUNS.items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager")
    model = PeftModel.from_pretrained(model, folder / "start", is_trainable=True)
    with tempfile.TemporaryDirectory() as scratch:
        args = DPOConfig(
            output_dir=scratch, per_device_train_batch_size=len(ROWS), num_train_epochs=50,
            learning_rate=out["lr"], lr_scheduler_type="constant", max_grad_norm=1.0,
            weight_decay=0.0, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
            bf16=False, fp16=False, gradient_checkpointing=False, max_length=64, seed=1,
            disable_tqdm=True, **kwargs)
        trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS),
                             processing_class=tokenizer)
        trainer.train()
    steps = [{key: log[key] for key in NAMES} for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 50, len(steps)
    out["runs"][name] = {"beta": kwargs["beta"], "steps": steps}
    print(name, steps[0], steps[-1])
(folder / "dpo.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
