"""A Hugging Face Trainer, watched: the one line is the callback."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from foreshock.monitor.integrations.huggingface import ForeshockCallback

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
)
tokens = torch.randint(64, (96, 12))
data = [{"input_ids": row, "labels": row} for row in tokens]

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=24,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        callbacks=[ForeshockCallback(run="hf-trainer")],
    )
    trainer.train()

for step, entry in enumerate(e for e in trainer.state.log_history if "loss" in e):
    print("loss", step, float(entry["loss"]))
