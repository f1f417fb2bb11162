# SPDX-License-Identifier: Apache-2.0
"""`fulgurite fit` and its sisters: short names, links, configuration files, messages, checkpoints, and `assemble`."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from fulgurite import Classification
from fulgurite.cli import main
from fulgurite.cli.train import FulguriteCLI, assemble, run
from fulgurite.errors import FulguriteError, PluginError
from fulgurite.models import MLP, SmallConvNet
from fulgurite.splice import Splice
from fulgurite_datamodules import MNIST1D, Digits
from fulgurite_plugins.distillation import PSKD
from tests.helpers import weights

QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
WORDS = [f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()]
FEW = ["--data.train_size=64"]

USERS = '''
import lightning.pytorch as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from fulgurite import Classification, Intervention

class Model(pl.LightningModule):
    def __init__(self, lr: float = 0.1, num_classes: int = 10, fails: str = ""):
        super().__init__()
        self.save_hyperparameters()
        self.fails = fails
        if fails == "value":
            raise ValueError("this is not a good value")
        if fails == "key":
            {}["missing"]
        self.net = torch.nn.Linear(64, num_classes)
    def training_step(self, batch, batch_idx):
        if self.fails == "interrupt":
            raise KeyboardInterrupt
        if self.fails == "bug":
            raise ZeroDivisionError("a bug of the user's own")
        return F.cross_entropy(self.net(batch[0].flatten(1)), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0].flatten(1)), batch[1]))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

class Another(Model):
    pass

class HandsOn(Classification):
    def __init__(self, extra: int = 1, **kwargs):
        super().__init__(**kwargs)

def pairs(classes):
    return DataLoader(TensorDataset(torch.randn(8, 64), torch.arange(8) % classes), batch_size=4)

class WithLoaders(Model):
    def train_dataloader(self):
        return pairs(3)

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return pairs(3)

class Counted(Data):
    def __init__(self):
        super().__init__()
        self.num_classes = 7

class Adds(Intervention):
    """Adds a parameter where only `operate` can."""
    def operate(self, module):
        module.added = torch.nn.Parameter(torch.zeros(3))
'''


@pytest.fixture(scope="module")
def users_code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    (folder / "users_own_code.py").write_text(USERS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("users_own_code", None)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch, users_code):
    """Run in an empty folder, with a command line of somebody else's and no seed from an earlier test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.delenv("PL_GLOBAL_SEED")
    monkeypatch.setattr(sys, "argv", ["somebody_elses_program", "--their=option"])


def build(*words: str) -> FulguriteCLI:
    return FulguriteCLI([*WORDS, *words], run=False, save_config=False)


def config_file(**config: Any) -> str:
    config["trainer"] = {**QUIET, **config.get("trainer", {})}
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    return "--config=mine.yaml"


# Defaults and short names


def test_the_defaults_train_at_once_and_leave_nothing_without_a_logger():
    assert run("fit", [*WORDS, *FEW]) == 0
    assert not list(Path.cwd().iterdir())


def test_the_defaults_are_the_digits_and_a_linked_classification():
    cli = build()
    assert isinstance(cli.datamodule, Digits)
    assert isinstance(cli.model, Classification)
    assert (cli.model.network[1].in_features, cli.model.num_classes) == (64, 10)


def test_a_plugin_goes_by_its_short_name_with_arguments():
    cli = build("--trainer.callbacks+=PSKD", "--trainer.callbacks.alpha=0.3")
    plugin = next(callback for callback in cli.trainer.callbacks if isinstance(callback, PSKD))
    assert plugin.alpha == 0.3


def test_data_and_networks_go_by_their_short_names():
    cli = build("--data=MNIST1D", "--data.train_size=500")
    assert isinstance(cli.datamodule, MNIST1D)
    assert cli.datamodule.train_size == 500
    assert cli.model.network[1].in_features == 40
    convolutions = build("--model.network=SmallConvNet", "--model.network.width=4").model.network
    assert isinstance(convolutions, SmallConvNet)
    assert convolutions.head.in_features == 8
    assert isinstance(build("--model.network=MLP", "--model.network.hidden=[5]").model.network, MLP)


def test_data_that_are_named_have_their_own_defaults_not_those_of_the_default_data():
    """`ModularArithmetic` trains on full batches; the 64 of `Digits` must not come along."""
    built = assemble({"data": {"class_path": "ModularArithmetic", "init_args": {"modulus": 7}}}, seed=False)
    assert built.datamodule.batch_size is None
    built = assemble({"data": "MNIST1D"}, seed=False)
    assert built.datamodule.batch_size == type(built.datamodule)().batch_size


@pytest.mark.parametrize("task", ["fulgurite.Classification", "fulgurite.Regression"])
def test_an_optimizer_that_is_named_has_its_own_defaults_not_those_of_the_default_optimizer(task):
    """The 0.01 of AdamW's weight decay once came along to SGD."""
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    model = {
        "class_path": task,
        "init_args": {"network": {"class_path": "torch.nn.LazyLinear", "init_args": {"out_features": 10}}},
    }
    built = assemble({"model": {**model, "init_args": {**model["init_args"], "optimizer": optimizer}}}, seed=False)
    group = built.model.make_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.0, 0.0)


def test_an_instance_as_network_needs_no_shapes():
    assert isinstance(build("--model.network=torch.nn.Flatten").model.network, torch.nn.Flatten)


@pytest.mark.parametrize("callbacks", [["PSKD"], [{"class_path": "PSKD"}], [{"class_path": "PSKD", "init_args": {}}]])
def test_a_configuration_file_takes_short_names(callbacks):
    config = config_file(trainer={"callbacks": callbacks}, data="MNIST1D", model={"network": "MLP"})
    cli = FulguriteCLI([config], run=False, save_config=False)
    assert any(isinstance(callback, PSKD) for callback in cli.trainer.callbacks)
    assert isinstance(cli.datamodule, MNIST1D)


def test_optimizer_and_schedule_come_from_the_command_line():
    cli = build(
        "--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.02", "--model.lr_scheduler=ExponentialLR",
        "--model.lr_scheduler.gamma=0.5", "--model.lr_interval=step",
    )  # fmt: skip
    made = cli.model.configure_optimizers()
    assert isinstance(made["optimizer"], torch.optim.Adam)
    assert made["optimizer"].param_groups[0]["lr"] == 0.02
    assert (made["lr_scheduler"]["scheduler"].gamma, made["lr_scheduler"]["interval"]) == (0.5, "step")


def test_a_plateau_schedule_comes_from_a_configuration():
    cli = assemble(
        {
            "trainer": QUIET,
            "optimizer": {"class_path": "SGD", "init_args": {"lr": 1.0}},
            "lr_scheduler": {
                "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
                "init_args": {"monitor": "val/nll", "factor": 0.5},
            },
        }
    )
    made = cli.model.configure_optimizers()
    assert made["lr_scheduler"]["monitor"] == "val/nll"
    assert made["lr_scheduler"]["scheduler"].factor == 0.5


# The user's own classes


def test_the_users_own_classes_train_unchanged():
    cli = FulguriteCLI(["fit", *WORDS, "--model=users_own_code.Model", "--data=users_own_code.Data"], save_config=False)
    assert cli.model.net.out_features == 10
    assert cli.trainer.global_step == 2


def test_the_data_give_the_classes_unless_they_are_typed():
    own = ["--model=users_own_code.Model"]
    assert build(*own, "--data=users_own_code.Counted").model.net.out_features == 7
    assert build(*own, "--data=users_own_code.Counted", "--model.num_classes=4").model.net.out_features == 4
    written = config_file(
        model={"class_path": "users_own_code.Model", "init_args": {"num_classes": 5}}, data="users_own_code.Counted"
    )
    assert FulguriteCLI([written], run=False).model.net.out_features == 5


def test_a_class_that_hands_its_arguments_on_is_linked_too():
    assert build("--model=users_own_code.HandsOn").model.num_classes == 10


def test_a_model_with_loaders_gets_no_data_unless_they_are_named():
    assert build("--model=users_own_code.WithLoaders").datamodule is None
    assert isinstance(build("--model=users_own_code.WithLoaders", "--data=Digits").datamodule, Digits)


def test_data_without_classes_for_a_task_that_needs_them():
    with pytest.raises(FulguriteError, match="`num_classes` of Classification to be a positive integer, but got None"):
        build("--data=users_own_code.Data")


# Configuration in and out


def test_a_printed_configuration_gives_the_same_again(capsys):
    words = ["--trainer.callbacks+=PSKD", "--trainer.callbacks.alpha=0.3", "--data=MNIST1D", "--seed_everything=3"]
    printed = []
    for arguments in ([*WORDS, *words], ["--config=printed.yaml"]):
        with pytest.raises(SystemExit) as end:
            run("fit", [*arguments, "--print_config"])
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
        Path("printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    assert yaml.safe_load(printed[0])["trainer"]["callbacks"][0]["init_args"]["alpha"] == 0.3


def test_the_configuration_is_saved_with_the_logger_and_trains_the_same_again():
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--seed_everything=5"]
    first = FulguriteCLI(["fit", *WORDS, *FEW, *logger])
    saved = Path(first.trainer.log_dir) / "config.yaml"
    again = FulguriteCLI(["fit", f"--config={saved}"])
    assert torch.equal(weights(first.model), weights(again.model))
    assert again.trainer.log_dir != first.trainer.log_dir
    with pytest.raises(FulguriteError, match="to be a new directory"):
        run("fit", [*WORDS, *FEW, *logger, "--trainer.logger.version=0"])


def test_the_seed_decides_the_weights():
    one, same, other = (build(f"--seed_everything={seed}").model for seed in (1, 1, 2))
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))


# Checkpoints


@pytest.fixture
def checkpoint():
    words = ["fit", *WORDS, "--model=users_own_code.Model", "--model.lr=0.3", *FEW]
    cli = FulguriteCLI(words, save_config=False)
    cli.trainer.save_checkpoint("mine.ckpt")
    return cli


def test_a_checkpoint_is_continued_and_validated(checkpoint):
    model = ["--model=users_own_code.Model", *FEW, "--ckpt_path=mine.ckpt"]
    cli = FulguriteCLI(["fit", *WORDS, "--trainer.max_epochs=2", *model], save_config=False)
    assert cli.model.hparams.lr == 0.3
    assert cli.trainer.global_step == 2
    cli = FulguriteCLI(["validate", *WORDS, *model], save_config=False)
    assert torch.equal(weights(cli.model), weights(checkpoint.model))


def test_what_is_typed_stands_above_the_checkpoint(checkpoint):
    # Stock Lightning takes the stored 0.3.
    words = ["--model=users_own_code.Model", "--model.lr=0.7", "--ckpt_path=mine.ckpt", *FEW]
    assert FulguriteCLI(["validate", *WORDS, *words], save_config=False).model.hparams.lr == 0.7


@pytest.mark.parametrize("model", [[], ["--model=users_own_code.Another"]])
def test_a_checkpoint_of_another_model_is_refused(checkpoint, model):
    with pytest.raises(FulguriteError, match=r"but got one of users_own_code\.Model\. Name that model"):
        run("validate", [*WORDS, *model, "--ckpt_path=mine.ckpt"])


def test_a_checkpoint_that_is_not_there():
    with pytest.raises(FulguriteError, match=r"not found.*nowhere\.ckpt"):
        run("fit", [*WORDS, *FEW, "--ckpt_path=nowhere.ckpt"])


# The optimizer is built late


def test_the_optimizer_gets_parameters_that_interventions_add():
    words = ["--trainer.callbacks+=users_own_code.Adds", "--optimizer=Adam", "--optimizer.lr=0.01"]
    cli = FulguriteCLI(["fit", *WORDS, *FEW, *words], save_config=False)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.Adam)
    assert any(parameter is cli.model.added for group in optimizer.param_groups for parameter in group["params"])


def test_a_model_with_a_late_optimizer_can_be_sent_to_another_process():
    cli = build("--model=users_own_code.Model", "--optimizer=Adam")
    copied = pickle.loads(pickle.dumps(cli.model))
    assert copied.configure_optimizers().param_groups[0]["params"][0] is copied.net.weight


def test_a_schedule_without_an_optimizer_is_refused():
    with pytest.raises(FulguriteError, match="Expected `optimizer` together with `lr_scheduler`"):
        build("--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5")


# Messages


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.callbacks+=PSDK"], r"No class 'PSDK' is known for `trainer\.callbacks`\. Did you mean 'PSKD'"),
        (["--model.network=SmallConvNt"], "'SmallConvNt' is known for `network` of Classification.*'SmallConvNet'"),
        (["--optimizer=Adma"], "'Adma' is known for `optimizer`.*'Adam'"),
        (["--data=Digit"], "'Digit' is known for `data`.*'Digits'"),
        (["--data=PSKD"], "'PSKD' is a component of the kind 'intervention', which `data` does not take"),
        (["--model=nowhere.Model"], r"`model`: nowhere\.Model: No module named 'nowhere'"),
        (["--model=users_own_code.Modle"], "no attribute 'Modle'"),
        (["--trainer.max_epoch=3"], r"no option --trainer\.max_epoch\. Did you mean 'trainer\.max_epochs'"),
        (["--modle=Foo"], "no option --modle. Did you mean 'model'"),
        (["stray"], "but got 'stray'"),
        (["--trainer.max_epochs=many"], r"Expected `trainer\.max_epochs` to be int or None, but got 'many'"),
        (
            ["--model.label_smothing=0.1"],
            "no argument `label_smothing` of Classification. Did you mean 'label_smoothing'",
        ),
        (
            ["--model.lr_interval=day"],
            "Expected `lr_interval` of Classification to be 'epoch' or 'step', but got 'day'",
        ),
        (["--data.train_size=-3"], "Expected `train_size` of Digits to be .* but got -3"),
        (["--data.train_size=x"], "Expected `train_size` of Digits to be int or None, but got 'x'"),
        (
            ["--trainer.callbacks+=PSKD", "--trainer.callbacks.alpha=1.5"],
            r"^Expected `alpha` of PSKD to be in \[0, 1\] \(or a Schedule within it\), but got 1\.5\.$",
        ),
        (
            ["--trainer.callbacks+=PSKD", "--trainer.callbacks.alpha=big"],
            "Expected `alpha` of PSKD to be float or Schedule, but got 'big'",
        ),
        (
            ["--trainer.callbacks+=PSKD", "--trainer.callbacks.teacher=me"],
            "Expected `teacher` of PSKD to be 'memory', 'snapshot', but got 'me'",
        ),
        (
            ["--trainer.callbacks+=PSKD", "--trainer.callbacks.alpa=1"],
            "no argument `alpa` of PSKD.*'alpha'.*It takes: alpha,",
        ),
        (["--lr_scheduler=CosineAnnealingLR"], r"a value for `T_max` of CosineAnnealingLR.*--lr_scheduler\.T_max"),
        (["--trainer.accelerator=tpuu"], "invalid accelerator name"),
        (["--config=nowhere.yaml"], r"does not exist.*nowhere\.yaml"),
        (
            ["--model=users_own_code.Model", "--model.fails=value"],
            r"ValueError: this is not a good value \(.*users_own_code\.py, line \d+\)",
        ),
        (
            ["--model=users_own_code.Model", "--model.fails=key"],
            r"KeyError: 'missing' \(.*users_own_code\.py, line \d+\)",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_told_with_its_reason(words, message):
    with pytest.raises(FulguriteError, match=message):
        run("fit", [*WORDS, *words])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modle": "Foo"}, r"no key `modle` \(in mine\.yaml\)\. Did you mean 'model'"),
        (
            {"trainer": {"max_epoch": 1}},
            r"no key `trainer\.max_epoch` \(in mine\.yaml\)\. Did you mean 'trainer\.max_epochs'",
        ),
        (
            {"trainer": {"callbacks": ["PSKD", "PSDK"]}},
            r"No class 'PSDK' .*trainer\.callbacks` \(in mine\.yaml\).*'PSKD'",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "PSKD", "init_args": {"alpa": 1}}]}},
            r"no argument `alpa` of PSKD \(in mine\.yaml\)\. Did you mean 'alpha'",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "PSKD", "init_args": {"alpha": 1.5}}]}},
            r"^Expected `alpha` of PSKD to be in \[0, 1\]",
        ),
        (
            {"model": {"network": {"class_path": "SmallConvNet", "init_args": {"wdth": 3}}}},
            "no argument `wdth` of SmallConvNet.*Did you mean 'width'",
        ),
        ({"data": {"train_sise": 3}}, "no argument `train_sise` of Digits.*'train_size'"),
    ],
)
def test_a_mistake_in_a_configuration_is_told_with_its_place(config, message):
    with pytest.raises(FulguriteError, match=message):
        run("fit", [config_file(**config)])
    if "(in" not in message:
        with pytest.raises(FulguriteError, match=message):
            assemble(config)


def test_a_configuration_that_is_no_yaml_is_named():
    Path("broken.yaml").write_text("trainer: [1\nfoo: }")
    with pytest.raises(FulguriteError, match=r"line 2.*in broken\.yaml"):
        run("fit", ["--config=broken.yaml"])


def test_a_mistake_that_shows_while_running_is_a_message_too():
    with pytest.raises(FulguriteError, match="Expected `train_size` of Digits to be at most 1200"):
        run("fit", [*WORDS, "--data.train_size=9999"])


def test_a_bug_in_the_users_training_step_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="a bug of the user's own"):
        run("fit", [*WORDS, *FEW, "--model=users_own_code.Model", "--model.fails=bug"])


def test_the_command_ends_with_status_two_and_no_traceback(capsys):
    assert main(["fit", *WORDS, "--trainer.callbacks+=PSDK"]) == 2
    error = capsys.readouterr().err
    assert "fulgurite fit: No class 'PSDK'" in error
    assert "Traceback" not in error


def test_an_interrupted_training_ends_with_the_status_of_an_interrupt():
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main(["fit", *WORDS, *FEW, "--model=users_own_code.Model", "--model.fails=interrupt"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_component_that_cannot_be_imported_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "fulgurite_plugins.distillation.ps_kd.intervention", None)
    with pytest.raises(PluginError, match="Plugin 'ps_kd': .* cannot be imported"):
        build("--trainer.callbacks+=PSKD")


# assemble


def test_assembling_reads_no_command_line_and_runs_nothing():
    mine = pl.callbacks.LearningRateMonitor()
    config = {
        "trainer": {**QUIET, "callbacks": ["PSKD"]},
        "data": {"class_path": "Digits", "init_args": {"train_size": 64}},
    }
    config |= {"ckpt_path": None, "weights_only": None}
    cli = assemble(config, callbacks=[mine], seed=3)
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert kinds == [PSKD, pl.callbacks.LearningRateMonitor]
    assert cli.trainer.callbacks[1] is mine
    assert not any(issubclass(kind, SaveConfigCallback) for kind in kinds)
    assert cli.trainer.global_step == 0
    assert cli.datamodule.train_size == 64


def test_assembling_again_gives_the_same_training():
    config = {"trainer": QUIET, "data": {"class_path": "Digits", "init_args": {"train_size": 64}}, "seed_everything": 9}
    trained = []
    for seed in (3, 3, 4, True):
        cli = assemble(config, seed=seed)
        assert cli.config.seed_everything == (9 if seed is True else seed)
        cli.trainer.fit(cli.model, cli.datamodule)
        trained.append(weights(cli.model))
        assert Splice.of(cli.trainer) is None
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])
    assert not torch.equal(trained[0], trained[3])


def test_assembling_without_a_seed_leaves_the_random_state_to_the_caller():
    made = []
    for _ in range(2):
        torch.manual_seed(7)
        made.append(weights(assemble({"trainer": QUIET, "seed_everything": 9}, seed=False).model))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], weights(assemble({"trainer": QUIET}, seed=9).model))


# explain


def test_explaining_a_configuration_does_not_train(capsys):
    words = [*WORDS, "--trainer.callbacks+=PSKD"]
    assert run("explain", words) == 0
    text = capsys.readouterr().out
    assert "pskd (PSKD, plugin ps_kd)" in text
    assert "criterion (CrossEntropyLoss), that of the task" in text
    assert run("explain", [*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["order"], data["refusal"], data["module"]) == ({"on_loss": ["pskd"]}, None, "Classification")
    assert not list(Path.cwd().iterdir())


# A real process


def test_a_fresh_process_imports_only_what_is_named():
    # Breaks if all plugins are imported, if the entry point needs something that the tests have imported already, or if
    # jsonargparse complains about how Lightning calls it.
    code = (
        "import sys; from fulgurite.cli import main; status = main(sys.argv[1:]);"
        "print([name for name in sys.modules if name.startswith('fulgurite_') and name.count('.') > 1]);"
        "print([name for name in sys.modules if name.startswith(('fulgurite.report', 'fulgurite_datamodules.mnist1d'))]);"
        "sys.exit(status)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", "-c", code, "fit", *WORDS, *FEW],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    deep, unwanted = result.stdout.splitlines()[-2:]
    assert "ps_kd.intervention" not in deep
    assert unwanted == "[]"
    assert "jsonargparse" not in result.stderr.lower()


def test_the_package_is_a_command_too():
    result = subprocess.run(
        [sys.executable, "-m", "fulgurite", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout.split()[0]) == (0, "fulgurite")
