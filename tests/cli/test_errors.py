"""Mistakes that the parser, the data or the model find are one line; misspelt names: `test_option_names.py`."""

import re

import pytest

from tests.helpers.runs import run, tiny_config

WITHOUT_CONFIG = ("fit", "generate", "generate --ckpt_path=THIS_FILE")
ENDLESS = "--trainer.max_steps=-1 --trainer.max_epochs=-1 --trainer.max_time=00:00:00:09"
EPOCHS = "--trainer.limit_train_batches=2 --trainer.check_val_every_n_epoch=1 --trainer.val_check_interval=9"
MISTAKES = {
    "fit --model.solver.beta=7": r"beta must be in \(0, 2\), got 7",
    "fit --model.solver.solver=reversibel": "model.solver.solver.*reversibel",
    "fit --model.network.d_model=15": "d_model must be a multiple of num_heads, got 15 and 2",
    "fit --model.network.d_model=wide": "model.network.d_model.*wide",
    "fit --data.path=nowhere.txt": "no such text file.*nowhere.txt",
    "fit --data.context_length=5000": "text has .* a window needs 5001",
    "fit --run.wandb=online": "WANDB_API_KEY",
    "fit --trainer.logger=false": "run.folder",
    "fit --trainer.log_every_n_steps=0": "trainer.log_every_n_steps=0.*choose a large number",
    "fit --trainer.logger=WandbLogger": "run.wandb=auto",
    "fit --trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be at least 1, got 0",
    "fit --trainer.max_steps=0": "trainer.max_steps=0 would train nothing",
    "fit --trainer.limit_train_batches=0": "trainer.limit_train_batches=0 would train nothing",
    "fit --trainer.gradient_clip_val=-1": "trainer.gradient_clip_val must be at least 0, got -1",
    "fit --trainer.default_root_dir=x": "trainer.default_root_dir=x has no effect: set run.folder",
    "fit --trainer.gradient_clip_algorithm=value": "gradient_clip_algorithm=value needs trainer.gradient_clip_val",
    "fit --trainer.use_distributed_sampler=false": "the data is always divided among the processes",
    "fit --diagnostics.certificate=raise --model.solver.adjoint=backprop": "certificate=raise: no gradient of this",
    "fit --data.dataset_name=x": "dataset_name has no effect without source .huggingface., got 'x': remove it",
    "fit --trainer.val_check_interval=0": "trainer.val_check_interval must be positive, got 0",
    "fit --run.sample_prompt=A": "run.sample_prompt='A': .*'A'.*: set another, or run.sample_tokens=0",
    "fit --run.sample_temperature=-1": r"run.sample_temperature must be in \[0, inf\), got -1",
    "fit --seed_everything=-1": "seed_everything: -1",
    "fit --trainer.benchmark=true": "trainer.benchmark=true.*the gradient would not be exact: remove it",
    "fit --trainer.benchmark=true --model.solver.arithmetic=exact64": "would not be exact: remove it",
    "fit --model.solver.solver=none --model.solver.beta=0.5": "solver='none' has no beta, got beta=0.5: remove it",
    "fit --model.solver.arithmetic=float32 --model.solver.mismatch=raise": "mismatch='raise' needs arithmetic='exact'",
    "fit --model.solver.solver=anderson --model.solver.mismatch=raise": "belongs to .*'reversible', got .*'implicit'",
    "fit --trainer.callbacks=LearningRateFinder": "LearningRateFinder.*set model.optimizer.lr",
    "fit --trainer.callbacks=BatchSizeFinder": "BatchSizeFinder.*set data.batch_size",
    "fit --trainer.callbacks=StochasticWeightAveraging --trainer.callbacks.swa_lrs=1": "set model.optimizer.ema_decay",
    f"fit --model.optimizer.schedule=linear {ENDLESS}": "schedule='linear' decays over the run: set trainer.max_",
    f"fit {EPOCHS}": "val_check_interval.*9",
    "fit --run.sample_prompt=${NO_SUCH_VARIABLE}": r"run.sample_prompt.*NO_SUCH_VARIABLE.*\\\${",
    "fit --run.sample_prompt=a${b": r"\\\${",
    "fit": "required.*--config FILE",
    "test": "test needs a checkpoint.*--ckpt_path",
    "test --ckpt_path=best": "no best.ckpt under",
    "validate --ckpt_path=nowhere.ckpt": "no checkpoint nowhere.ckpt",
    "generate --ckpt_path=THIS_FILE": "test_errors.py is not a checkpoint, or a truncated one",
    "generate": "ckpt_path",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_told_in_one_line(tmp_path, capsys, monkeypatch, words):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in ~/.netrc
    monkeypatch.delenv("NETRC", raising=False)
    command, *options = words.replace("THIS_FILE", __file__).split()
    config = () if words in WITHOUT_CONFIG else ("--config", tiny_config(tmp_path))
    with pytest.raises(SystemExit) as caught:
        run(command, *config, *options)
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO: Tokenizing")]
    assert line.startswith("error: ")
    assert len(line) < 300
    assert re.search(MISTAKES[words], line), line
