# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook awx_setup against the argument specs of awx.awx 24.6; stand-ins for its modules check and note."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.kvmops.backup.tests.lab.modules import Ansible

TOP = Path(__file__).resolve().parents[4]
SPECS: dict[str, Any] = json.loads((Path(__file__).parent / "argument_specs.json").read_text(encoding="utf-8"))
NODES: dict[str, Any] = SPECS.pop("workflow_job_template:workflow_nodes")

STAND_IN = """#!/usr/bin/python
import json
from ansible.module_utils.basic import AnsibleModule

def main():
    module = AnsibleModule(argument_spec=json.loads(%r))
    with open(%r, "a") as file:
        file.write(json.dumps([%r, {k: v for k, v in module.params.items() if v is not None}]) + "\\n")
    module.exit_json(changed=True)

main()
"""


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the stand-ins write their parameters to."""
    collection = tmp_path / "ansible_collections" / "awx" / "awx"
    (collection / "plugins" / "modules").mkdir(parents=True)
    (collection / "galaxy.yml").write_text("namespace: awx\nname: awx\nversion: 24.6.1\n", encoding="utf-8")
    notes = tmp_path / "notes"
    for module, spec in SPECS.items():
        text = STAND_IN % (json.dumps(spec), str(notes), module)
        (collection / "plugins" / "modules" / f"{module}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("ANSIBLE_COLLECTIONS_PATH", f"{os.environ['ANSIBLE_COLLECTIONS_PATH']}:{tmp_path}")
    return notes


def made(notes: Path) -> list[tuple[str, dict[str, Any]]]:
    return [tuple(json.loads(line)) for line in notes.read_text(encoding="utf-8").splitlines()]


def test_everything_is_made_in_order_and_fits_together(noted: Path, ansible: Ansible) -> None:
    ansible.playbook(
        "kvmops.backup.awx_setup", awx_setup_inventory="My hosts", awx_setup_pool="nfs", awx_setup_time="013000"
    )
    objects = made(noted)
    assert [module for module, _params in objects] == [
        "execution_environment", "project", *["job_template"] * 5, "workflow_job_template", "schedule",
    ]  # fmt: skip
    templates = {params["name"]: params for module, params in objects if module == "job_template"}
    for params in templates.values():
        assert (TOP / params["playbook"]).is_file()
        assert params["inventory"] == "My hosts"
        assert params["project"] == objects[1][1]["name"]
        assert params["execution_environment"] == objects[0][1]["name"]

    workflow = objects[-2][1]
    nodes = {node["identifier"]: node for node in workflow["workflow_nodes"]}
    assert list(nodes) == ["backup", "verify", "retention", "report"]
    for node in nodes.values():
        assert set(node) <= set(NODES)
        assert set(node["unified_job_template"]) <= set(NODES["unified_job_template"])
        assert set(node.get("related", {})) <= set(NODES["related"])
        assert node["unified_job_template"]["name"] in templates
        for following in (each for kind in node.get("related", {}).values() for each in kind):
            assert following["identifier"] in nodes
    schedule = objects[-1][1]
    assert schedule["unified_job_template"] == workflow["name"]
    assert schedule["rrule"] == "DTSTART;TZID=Europe/Berlin:20260101T013000 RRULE:FREQ=DAILY;INTERVAL=1"


def test_surveys_ask_for_variables_that_the_playbooks_know_and_need_no_answer_at_night(
    noted: Path, ansible: Ansible
) -> None:
    ansible.playbook("kvmops.backup.awx_setup", awx_setup_pool="nfs")
    for _module, params in (each for each in made(noted) if each[0] == "job_template"):
        playbook = (TOP / params["playbook"]).read_text(encoding="utf-8")
        known = set()
        for play in yaml.safe_load(playbook):
            for role in play.get("roles", ()):
                role_specs = TOP / "roles" / role["role"].rpartition(".")[2] / "meta" / "argument_specs.yml"
                known |= set(
                    yaml.safe_load(role_specs.read_text(encoding="utf-8"))["argument_specs"]["main"]["options"]
                )
        for question in params["survey_spec"]["spec"]:
            assert question["variable"] in known or question["variable"] in playbook, question
            assert question["required"]
            assert question["type"] in ("text", "integer", "multiplechoice")
            if question["type"] == "multiplechoice":
                assert question["default"] in question["choices"]
            if question["type"] == "integer":
                assert question["min"] <= question["default"] <= question["max"]
            if "restore" not in params["name"]:
                assert question["default"] not in ("", None)
    pools = [
        question["default"]
        for _module, params in made(noted)
        for question in params.get("survey_spec", {}).get("spec", ())
        if question["variable"].endswith("_pool")
    ]
    assert pools == ["nfs"] * 5


def test_an_option_that_awx_does_not_know_is_seen_here(noted: Path, ansible: Ansible, tmp_path: Path) -> None:
    """The stand-ins do check."""
    text = (TOP / "playbooks" / "awx_setup.yml").read_text(encoding="utf-8").replace(" scm_branch:", " scm_twig:")
    spoilt = tmp_path / "spoilt.yml"
    spoilt.write_text(text, encoding="utf-8")
    played = ansible.playbook(str(spoilt), fails=True)
    assert "Unsupported parameters" in played.tasks[-1].data["msg"]
