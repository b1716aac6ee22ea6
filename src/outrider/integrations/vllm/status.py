"""Which of our parts are live in a vLLM server, and which setting switched what off. Plain values, for endpoint and `doctor`."""

from __future__ import annotations

import os
from typing import Any

from outrider.integrations.vllm import PLUGINS

ALL = ",".join(PLUGINS)


def part(name: str, live: bool, told: str, remedy: str = "") -> dict[str, Any]:
    """One part. remedy: what switches it on; "" if nothing is to be done."""
    return {"part": name, "live": live, "found": told, "remedy": "" if live else remedy}


def parts_of(config: Any, report: dict[str, Any] | None, ledger: bool) -> list[dict[str, Any]]:
    """Every part of ours in this server.

    config: vLLM's configuration. report: of our worker class, None without it. ledger: whether our stat logger counts.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    named = "all plug-ins are allowed" if allowed is None else f"VLLM_PLUGINS={allowed}"
    speculative = config.speculative_config
    out = [part("endpoint", True, named)]
    out.append(part("ledger", ledger, named, f"VLLM_PLUGINS is one list for all groups: set VLLM_PLUGINS={ALL}"))
    general = allowed is None or "outrider" in allowed.split(",")
    out.append(part("plug-in", general, named, f"VLLM_PLUGINS is one list for all groups: set VLLM_PLUGINS={ALL}"))
    if speculative is None:
        return [
            *out,
            part("speculation", False, "vLLM was started without speculation", "give it a --speculative-config"),
        ]
    method = f"{speculative.method}, at most {speculative.num_speculative_tokens} tokens"
    out.append(part("speculation", True, method))
    out += [_worker(report), _repair(report, general), _lengths(config, report), _rule(config, report)]
    if report is not None and report["large_pages"]["of"]:  # on CPUs whose system has them
        moved, of = (report["large_pages"][name] >> 20 for name in ("bytes", "of"))
        out.append(part("large pages", True, f"{moved} of {of} MB of weights, keys and values moved there"))
    if speculative.method == "custom_class":
        own = (report or {}).get("proposer")
        told = speculative.model if own is None else f"{own['drafter']}, {own['faults']} faults"
        out.append(
            part("proposer", own is not None and not own["notices"], told, " ".join((own or {}).get("notices", ())))
        )
    return out


def _worker(report: dict[str, Any] | None) -> dict[str, Any]:
    remedy = "add --worker-cls outrider.integrations.vllm.CpuWorker (GpuWorker on GPUs)"
    if report is None:
        return part("predicted rejections", False, "vLLM's own worker class", remedy)
    if report["tap"] is None:
        return part("predicted rejections", False, report["unwatched"], "see docs/vllm.md, 'what does not work'")
    return part("predicted rejections", True, "our worker class watches the rejection sampler")


def _repair(report: dict[str, Any] | None, general: bool) -> dict[str, Any]:
    remedy = f"the general plug-in `outrider` is not loaded: set VLLM_PLUGINS={ALL}"
    if report is None:
        return part(
            "repair", general, "the plug-in probes in every process; our worker class would tell what it found", remedy
        )
    told = {
        "repaired": "the fault of CPUs without Triton was found and is repaired",
        "sound": "the probe found no fault",
        "unused": "not needed: Triton, or no CPU",
        "faulty": "sampled output is WRONG: the fault of CPUs without Triton is there",
    }
    return part("repair", report["repair"] != "faulty", told[report["repair"]], remedy)


def _lengths(config: Any, report: dict[str, Any] | None) -> dict[str, Any]:
    speculative, note = config.speculative_config, {} if report is None else report["note"]
    ours = "outrider" in str(config.scheduler_config.scheduler_cls)
    if speculative.method == "custom_class":
        return part("lengths", True, "our proposer sets them")
    if not ours:
        table = speculative.num_speculative_tokens_per_batch_size
        told = "vLLM's table by batch size" if table else "one fixed length"
        return part("lengths", False, told, "add --scheduler-cls outrider.integrations.vllm.Scheduler")
    look = note.get("outlook")
    told = "ours" if look is None else f"ours: {look[1]} now, {look[0]} sequences"
    if report is not None:
        told += "; the drafter rests at length 0" if not report["restless"] else f"; {report['restless']}"
        told += (
            f", but its steps prepare drafts: {report['drafting']}" if report["drafting"] != report["restless"] else ""
        )
    return part("lengths", True, told)


def _rule(config: Any, report: dict[str, Any] | None) -> dict[str, Any]:
    from outrider.integrations.vllm.settings import Settings  # here: `doctor` needs none of what it loads

    asked = Settings.of(config.additional_config).rule
    if asked == "vllm":
        return part("rule", True, "vLLM's own")
    live = report is not None and report["tap"] is not None
    remedy = "our worker class puts it there: add --worker-cls outrider.integrations.vllm.CpuWorker (GpuWorker on GPUs)"
    return part("rule", live, asked if live else f"vLLM's own, where {asked} was asked for", remedy)
