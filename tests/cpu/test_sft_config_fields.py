"""The packaged list of SFTConfig's fields is the one of the installed trl."""

from __future__ import annotations

from sft_dist.config import sft_fields

REGENERATE = (
    "write the list again: python -c 'import json; from sft_dist.config.sft_fields import sft_config_fields as f; "
    "print(json.dumps(f(), indent=2))' > sft_dist/resources/sft_config_fields.json"
)


def test_the_packaged_list_is_that_of_the_installed_trl():
    assert sorted(sft_fields.known_sft_fields()) == sft_fields.sft_config_fields(), REGENERATE


def test_every_refused_name_is_a_field_of_sft_config():
    refused = set(sft_fields.SET_ELSEWHERE) | set(sft_fields.SET_BY_SFT_DIST) | {"gradient_accumulation_steps"}
    assert refused <= set(sft_fields.sft_config_fields())
