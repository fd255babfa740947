"""A script as users write it: `launched.py accelerate | trainer FOLDER`; losses go into a file."""

import json
import sys
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

import prefixattn

ROWS, STEPS, RATE = 4, 3, 0.05


def make_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    prefix = prefixattn.Prefix.from_text(model, torch.arange(5, 11)[None])
    prefixattn.attach(model, prefix)
    return model, prefix


def make_rows():
    return torch.randint(2, 90, (ROWS * STEPS, 9), generator=torch.Generator().manual_seed(3))


def write(folder, losses, processes):
    (folder / "losses.json").write_text(json.dumps({"losses": losses, "processes": processes}))


def by_accelerate(folder):
    accelerator = Accelerator(cpu=True)
    model, prefix = make_model()
    own = ROWS // accelerator.num_processes
    loader = torch.utils.data.DataLoader(make_rows(), batch_size=own)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=RATE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for ids in loader:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    if accelerator.is_main_process:
        prefix.save_pretrained(folder / "prefix")
        write(folder, losses, accelerator.num_processes)


def by_trainer(folder):
    model, prefix = make_model()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_steps=STEPS,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=True,
        per_device_train_batch_size=ROWS,
    )
    arguments.per_device_train_batch_size = ROWS // arguments.world_size
    data = [{"input_ids": row, "labels": row} for row in make_rows()]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer._get_train_sampler = lambda *given: torch.utils.data.SequentialSampler(data)
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        prefix.save_pretrained(folder / "prefix")
        write(folder, [float(loss) for loss in losses], arguments.world_size)


if __name__ == "__main__":
    {"accelerate": by_accelerate, "trainer": by_trainer}[sys.argv[1]](Path(sys.argv[2]))
    # gloo's threads want the GIL while the interpreter goes, and abort then: pytorch/pytorch#179291
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
