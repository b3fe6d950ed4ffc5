"""transformers' own Trainer without gradients: evaluation, early stopping, the best checkpoint."""

from importlib.util import find_spec

import numpy as np
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, set_seed

from objectives import ClassificationLoss
from support.topics import bbc_topics
from zo_adapt import ZOConfig, ZOTrainer

folder, tokenizer, names, train, test = bbc_topics()
set_seed(0)  # draws the new head
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16))
args = ZOConfig(
    "runs/trainer",
    max_queries=16_000,  # forward passes of one text
    per_device_train_batch_size=16,
    per_device_eval_batch_size=64,
    lora_start_rows=128,
    eval_strategy="steps",
    eval_steps=25,
    save_steps=25,
    logging_steps=25,
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    report_to="tensorboard" if find_spec("tensorboard") else "none",
)
trainer = ZOTrainer(
    model,
    args,
    train_dataset=train,
    eval_dataset=test,
    processing_class=tokenizer,
    objective=ClassificationLoss(model),
    compute_metrics=lambda p: {"accuracy": np.mean(p.predictions.argmax(-1) == p.label_ids)},
    callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
)
print(f"held-out accuracy before: {trainer.evaluate()['eval_accuracy']:.3f}")
trainer.train()
print(f"held-out accuracy after: {trainer.evaluate()['eval_accuracy']:.3f}")
trainer.save_model()
