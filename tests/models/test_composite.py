from __future__ import annotations

import pytest
from torch import Tensor, nn

from keepbest.errors import ConfigError
from keepbest.models import CompositeModel


class Chain(CompositeModel):
    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        for submodel in self.submodels.values():
            batch = submodel(batch)
        return {"output": batch}

    def losses(self, outputs: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
        return {"total": (outputs["output"] - batch).square().mean(1)}


def test_submodels_are_children_under_their_names():
    encoder, decoder = nn.Linear(2, 1), nn.Linear(1, 2)
    model = Chain({"encoder": encoder, "decoder": decoder})
    assert model.submodels == {"encoder": encoder, "decoder": decoder}
    assert model.encoder is encoder
    assert set(model.state_dict()) == {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}


def test_submodel_that_was_replaced_is_the_new_one():
    model = Chain({"encoder": nn.Linear(2, 2)})
    model.encoder = nn.Identity()
    assert isinstance(model.submodels["encoder"], nn.Identity)


def test_leaves_of_nested_composites_have_dotted_names():
    inner = Chain({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    model = Chain({"autoencoder": inner, "head": nn.Linear(2, 2)})
    assert model.leaves() == {
        "autoencoder.encoder": inner.encoder,
        "autoencoder.decoder": inner.decoder,
        "head": model.head,
    }


@pytest.mark.parametrize("name", ["forward", "a.b", "", "2nd", "training"])
def test_name_that_cannot_be_registered_is_refused(name):
    with pytest.raises(ConfigError, match="cannot name a submodel"):
        Chain({name: nn.Linear(2, 2)})


def test_no_submodels_are_refused():
    with pytest.raises(ConfigError, match="at least one submodel"):
        Chain({})


def test_is_frozen_follows_the_parameters():
    model = Chain({"encoder": nn.Linear(2, 2)})
    assert not model.is_frozen
    model.requires_grad_(requires_grad=False)
    assert model.is_frozen
    model.encoder.bias.requires_grad_()
    assert not model.is_frozen
