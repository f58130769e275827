"""PPO against numbers recorded from TRL 0.4.1.

The folder is named by `SUPERHF_GOLDEN` (default: ../shared/golden/trl_ppo beside the repository). Every file in it is checked, and
every setting is read from the files, so a further recorded variant needs no new code. Its README explains fields and agreement.
"""
import copy, json, math, os, re
from dataclasses import replace
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from superhf.ppo import (PPOConfig, adapt_kl_coef, gae, entropy, lay_out, masked_mean, masked_var, policy_losses, ppo_learning_rate,
                         token_logprobs, token_rewards, value_losses, whiten)
from superhf.ppo_update import PolicyWithValue, Rollout, StartingPolicy, ValueHead, minibatch_stats, ppo_step, rollout_stats

GOLDEN = Path(os.environ.get("SUPERHF_GOLDEN") or Path(__file__).resolve().parents[2]/"shared"/"golden"/"trl_ppo")
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"recorded numbers not found: {GOLDEN} (name their folder with SUPERHF_GOLDEN)")
torch.set_num_threads(1)

# ---------------------------------------------------------------- reading and comparing

def tensor(record):
    "A recorded tensor; a plain number or list is taken as float64."
    if not isinstance(record, dict): return torch.as_tensor(record, dtype=torch.float64)
    return torch.tensor(record["data"], dtype=getattr(torch, record["dtype"])).reshape(record["shape"])

def read(name): return json.loads((GOLDEN/name).read_text())

def agree(ours, theirs, what, tol, where=None):
    "Fails unless |ours - theirs| <= tol·max(1, |theirs|) everywhere (or where `where` is true); NaN and infinity must match."
    a, b = (x.detach().double() if isinstance(x, torch.Tensor) else tensor(x).double() for x in (ours, theirs))
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, recorded {tuple(b.shape)}"
    if where is not None: a, b = a[where], b[where]
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0., ((a - b).abs()/b.abs().clamp(min=1)).nan_to_num(nan=math.inf))
    assert off.numel() == 0 or off.max() <= tol, f"{what}: off by {off.max().item():.3g}, allowed {tol:g}"

def tolerance(dtype, exact=1e-13, single=2e-6): return exact if "64" in str(dtype) else single

def all_cases():
    "Every case of the files that hold `cases` or lists of them: (file, list, number)."
    found = []
    if GOLDEN.is_dir():
        for path in sorted(GOLDEN.glob("*.json")):
            for key, cases in read(path.name).items():
                if isinstance(cases, list) and cases and isinstance(cases[0], dict) and kind_of(cases[0]): found.append((path.name, key))
    return found

def kind_of(case):
    "Which function a recorded case is about, by its fields."
    for kind, fields in dict(controller={"current_kl", "value_after"}, masked={"values", "mask", "masked_var"}, whiten={"values", "whiten_shift"},
                             losses={"new_logprobs", "advantages_raw"}, gae={"gamma", "lam", "advantages_raw"}, rewards={"kl_coef", "scores", "rewards"}).items():
        if fields <= set(case): return kind

# ---------------------------------------------------------------- the functions

def check_controller(c, about):
    value = c["init"]
    for kl, n, after in zip(c["current_kl"], c["n_steps"], c["value_after"]):
        if c["kind"] == "adaptive": value = adapt_kl_coef(value, kl, n, c["target"], c["horizon"])
        agree(value, after, f"{c['name']}: coefficient", 1e-15)

def check_whiten(c, about):
    x = tensor(c["values"]); tol = tolerance(x.dtype)
    agree(x.mean(), c["mean"], "mean", tol)
    agree(masked_var(x, torch.ones_like(x)), c["var_unbiased"], "variance", tol)
    scale = 1 if x.dtype == torch.float64 or x.numel() < 2 else max(1, float(x.abs().max()*(x.var() + 1e-8)**-0.5))   # cancellation in x - mean
    for shift in (True, False): agree(whiten(x, shift_mean=shift), c["whiten_shift" if shift else "whiten_noshift"], f"{c['name']}: whitened", tol*scale)

def check_masked(c, about):
    x, mask = tensor(c["values"]), tensor(c["mask"]); tol = tolerance(x.dtype)
    agree(masked_mean(x, mask), c["masked_mean"], "mean", tol)
    agree(masked_mean(x, mask, 1), c["masked_mean_axis1"], "mean by row", tol)
    agree(masked_var(x, mask), c["masked_var"], "variance", tol)
    agree(masked_var(x, mask, unbiased=False), c["masked_var_biased"], "biased variance", tol)
    scale = 1 if x.dtype == torch.float64 else 10
    for shift in (True, False): agree(whiten(x, mask, shift), c["whiten_shift" if shift else "whiten_noshift"], f"{c['name']}: whitened", tol*scale)

def option(name, *places):
    "An option of the authors' fork, wherever a file names it."
    for place in places:
        for holder in (place, place.get("config"), place.get("options")):
            if isinstance(holder, dict) and name in holder: return bool(holder[name])
    return None

def check_rewards(c, about):
    lp, ref, mask, scores = (tensor(c[k]) for k in ("logprobs", "ref_logprobs", "mask", "scores")); tol = tolerance(lp.dtype)
    file, rest = about
    clip = option("clip_kl", c, rest); clip = "clipkl" in file if clip is None else clip
    rewards, kl_part = token_rewards(scores, lp, ref, mask, c["kl_coef"], clip)
    agree(kl_part, c["non_score_rewards"], f"{c['name']}: KL part", tol)
    white = option("whiten_rewards", c, rest); white = "whiten" in file if white is None else white
    if white and "rewards_whitened" not in c and not close(rewards, tensor(c["rewards"]), tol): rewards = whiten(rewards, mask, shift_mean=False)
    agree(rewards, c["rewards"], f"{c['name']}: rewards", tol if not white else 10*tol)
    if "rewards_whitened" in c: agree(whiten(rewards, mask, shift_mean=False), c["rewards_whitened"], "whitened rewards", 10*tol)
    roll = Rollout(ids=None, attention_mask=None, mask=mask, scores=scores, at=mask.bool(), logprobs=lp, values=lp, ref_logprobs=ref, rewards=rewards, kl_part=kl_part)
    check_stats(rollout_stats(roll, c["kl_coef"]), c.get("stats", {}), c["name"], tol*5)

def close(a, b, tol): return a.shape == b.shape and bool(((a - b).abs() <= tol*b.abs().clamp(min=1)).all())

def check_gae(c, about):
    v, r, mask = tensor(c["values"]), tensor(c["rewards"]), tensor(c["mask"]); tol = tolerance(v.dtype)
    A, R = gae(r, v, mask, c["gamma"], c["lam"])
    agree(A, c["advantages_raw"], f"{c['name']}: advantages", tol)
    agree(R, c["returns"], f"{c['name']}: returns", tol)
    white = whiten(A, mask)
    agree(white, c["advantages_whitened"], f"{c['name']}: whitened", tol*10)
    for ours, name in ((masked_mean(R, mask), "returns_mean"), (masked_var(R, mask), "returns_var"), (masked_mean(white, mask), "advantages_mean")):
        if name in c: agree(ours, c[name], name, tol*10)

def check_losses(c, about):
    old, old_v, r, z, labels, mask = (tensor(c[k]) for k in ("old_logprobs", "old_values", "rewards", "new_logits", "labels", "mask"))
    tol = 10*tolerance(old.dtype, 1e-14, 1e-6)
    agree(token_logprobs(z, labels), c["new_logprobs"], "log-probabilities", tol)
    lp, v = tensor(c["new_logprobs"]).requires_grad_(), tensor(c["new_values"]).requires_grad_()
    raw, R = gae(r, old_v, mask, c["gamma"], c["lam"])
    A = whiten(raw, mask)
    agree(raw, c["advantages_raw"], "advantages", tol); agree(R, c["returns"], "returns", tol); agree(A, c["advantages_whitened"], "whitened", tol)
    pi, val = policy_losses(lp, old, A, c["cliprange"])[0], value_losses(v, old_v, R, c["cliprange_value"])[0]
    pi, val = masked_mean(pi, mask), c["vf_coef"]*masked_mean(val, mask)
    agree(pi, c["loss_policy_returned"], "policy loss", tol); agree(val, c["loss_value_returned_times_vf_coef"], "value loss", tol)
    g_lp, g_v = torch.autograd.grad(pi + val, (lp, v))
    agree(g_lp, c["grad_new_logprobs"], f"{c['name']}: gradient of log-probabilities", tol)
    agree(g_v, c["grad_new_values"], f"{c['name']}: gradient of values", tol)
    roll = Rollout(ids=None, attention_mask=None, mask=mask, scores=None, at=mask.bool(), logprobs=old, values=old_v, ref_logprobs=old, rewards=r, kl_part=r)
    settings = PPOConfig(cliprange=c["cliprange"], cliprange_value=c["cliprange_value"], vf_coef=c["vf_coef"])
    stats = minibatch_stats(roll, slice(None), (lp.detach(), v.detach(), entropy(z)), A, R, settings)
    check_stats(stats, c["stats"], c["name"], tol, complete=True)

SUMS = ("objective/kl", "objective/kl_dist", "objective/entropy")   # over the tokens of an answer, so their rounding adds up

def check_stats(ours, theirs, what, tol, where=None, complete=False):
    "Every recorded statistic; `complete`: each of them must be one that we have."
    for name, value in theirs.items():
        if name.startswith("time/"): continue
        if name not in ours:
            assert not complete, f"{what}: statistic {name} is missing"
            continue
        spots = where.get(name) if where else None
        agree(ours[name], value, f"{what}: {name}", tol*(3 if name in SUMS else 1), spots)

CHECKS = dict(controller=check_controller, whiten=check_whiten, masked=check_masked, rewards=check_rewards, gae=check_gae, losses=check_losses)

@pytest.mark.parametrize("file,key", all_cases())
def test_functions(file, key):
    "Every recorded case of every file of cases."
    data = read(file)
    rest = {k: v for k, v in data.items() if not isinstance(v, list)}
    for case in data[key]: CHECKS[kind_of(case)](case, (file, rest))

# ---------------------------------------------------------------- the tiny model

def our_name(name): return name.replace("embed_out.", "lm_head.") if name.startswith("embed_out.") else name

def load_model(file, dtype):
    "The recorded GPT-NeoX with its value head, in our model."
    settings = dict(read("step.json")["model_config"])
    settings["rope_parameters"] = dict(rope_type="default", rope_theta=float(settings.pop("rotary_emb_base")), partial_rotary_factor=settings.pop("rotary_pct"))
    lm = GPTNeoXForCausalLM(GPTNeoXConfig(**settings)).to(dtype).eval()
    lm.set_attn_implementation("sdpa")
    head = ValueHead(settings["hidden_size"]).to(dtype)
    model = PolicyWithValue(lm, head)
    put(model, load_file(GOLDEN/file))
    return model

def put(model, weights):
    "Copy weights under their recorded names into the model; all must be there."
    ours = dict(named(model))
    heads = [n for n in ours if n.startswith("v_head.")]
    assert {our_name(n) for n in weights} | set(heads) == set(ours), "parameter names"
    with torch.no_grad():
        for n, w in weights.items(): ours[our_name(n)].copy_(w)

def named(model):
    "Parameters under Hugging Face's names, and the value head's."
    return [*model.policy.named_parameters(), *(("v_head." + n, p) for n, p in model.v_head.named_parameters())]

def turning(name, value, settings):
    "Where a parameter is not a key bias outside the rotary dimensions: those have a true gradient of 0 and move by round-off alone."
    keep = torch.ones_like(value, dtype=torch.bool)
    if not name.endswith("query_key_value.bias"): return keep
    size = settings["hidden_size"]//settings["num_attention_heads"]
    keep.view(settings["num_attention_heads"], 3, size)[:, 1, int(size*settings["rotary_pct"]):] = False
    return keep

forwards = sorted(p.name for p in GOLDEN.glob("init_forward*.safetensors")) if GOLDEN.is_dir() else []

@pytest.mark.parametrize("file", forwards)
def test_forward(file):
    "Logits and values of the starting weights, both sides of padding."
    data = load_file(GOLDEN/file)
    for side in sorted({k.split(".")[0] for k in data}):
        part = {k.split(".", 1)[1]: v for k, v in data.items() if k.startswith(side + ".")}
        dtype, real = part["policy_logits"].dtype, part["attention_mask"].bool()
        tol = tolerance(dtype, 1e-12, 3e-6)
        batch = read("step.json")["batches"][0]
        rows = lay_out(batch["queries"], batch["responses"], batch["scores"], read("step.json")["pad_token_id"], side)
        agree(rows.ids, part["input_ids"], "ids", 0); agree(rows.attention_mask, part["attention_mask"], "attention mask", 0)
        for who, name in (("policy", "init_policy.safetensors"), ("ref", "init_ref.safetensors")):
            model = load_model(name, dtype)
            with torch.no_grad(): out = model.policy(input_ids=rows.ids, attention_mask=rows.attention_mask, output_hidden_states=True)
            agree(out.logits, part[f"{who}_logits"], f"{side} {who} logits", tol, real)
            if who == "policy": agree(model.v_head(out.hidden_states[-1]), part["policy_values"], f"{side} values", tol, real)

# ---------------------------------------------------------------- whole steps

def rates_of(run):
    "Recorded learning rates: of every step, and of the one that would have come next."
    used = [step["stats"].get("ppo/learning_rate", run["config"]["learning_rate"]) for step in run["steps"]]
    return used + [run["steps"][-1].get("learning_rate_after", used[-1])]

def schedule_of(run):
    "The schedule that gives the recorded rates, by its textbook formula, as fields of our config; empty where there is none."
    rates, base = rates_of(run), run["config"]["learning_rate"]
    if all(r == base for r in rates): return dict(schedule="constant", warmup_superbatches=0)
    def factor(i, w, T): return i/w if i < w else max(0, T - i)/(T - w)
    for w in range(50):
        if all(math.isclose(r, base*min(1, i/max(w, 1)) if w else base, rel_tol=1e-12, abs_tol=0) for i, r in enumerate(rates)): return dict(schedule="constant", warmup_superbatches=w)
        for T in range(w + 1, 2000):
            if all(math.isclose(r, base*factor(i, w, T), rel_tol=1e-12, abs_tol=0) for i, r in enumerate(rates)): return dict(schedule="linear", warmup_superbatches=w, superbatches=T)
    return {}

def settings_of(run):
    "Our config for a recorded run."
    c = run["config"]
    same = ("adap_kl_ctrl", "init_kl_coef", "target", "horizon", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "ppo_epochs")
    fork = {k: bool(option(k, run)) for k in ("clip_kl", "whiten_rewards")}
    m = c["mini_batch_size"]
    return PPOConfig(**{k: c[k] for k in same}, **fork, learning_rate=c["learning_rate"], max_grad_norm=c.get("max_grad_norm") or 0.0, minibatch_size=m,
                     superbatch_size=c["batch_size"], superbatch_prompts=c["batch_size"], finetuning_batch_size=m, whiten="minibatch",
                     value_dropout=run.get("summary_dropout_prob") or 0.0, **schedule_of(run))

class Replay(torch.nn.Module):
    "Dropout by recorded masks, in the order of the calls."
    def __init__(self, masks, p): super().__init__(); self.masks, self.p = masks, p

    def forward(self, x, generator=None):
        keep = self.masks.pop(0)
        return x*keep[:, :-1].reshape(x.shape).to(x)/(1 - self.p)

def dropout_masks(variant, step):
    "Keep masks of the policy's value head in a step, in call order; None where none were recorded."
    path = GOLDEN/f"step_{variant}.dropout_keep.safetensors"
    if not path.exists(): return None
    found = []
    for key, mask in load_file(path).items():
        m = re.fullmatch(r"step(\d+)\.call(\d+)\.policy", key)
        if m: found.append((int(m[1]), int(m[2]), mask))
    first = min(s for s, *_ in found)
    return [mask for s, _, mask in sorted(found, key=lambda f: f[:2]) if s - first == step]

def variants():
    return sorted(p.stem.removeprefix("step_") for p in GOLDEN.glob("step_*.json")) if GOLDEN.is_dir() else []

@pytest.mark.parametrize("variant", variants())
def test_steps(variant):
    "Every recorded PPO step: rewards, every minibatch, every statistic, KL coefficient, learning rate, weights."
    run, index = read(f"step_{variant}.json"), read("step.json")
    dtype, c = getattr(torch, run["dtype"]), settings_of(run)
    exact = dtype == torch.float64
    tol, stat_tol, weight_tol = (1e-9, 1e-9, 1e-9) if exact else (3e-6, 1e-5, 5e-7)
    model = load_model(index["init_policy"], dtype)
    alone = str(run.get("ref")).lower().split()[:1] in ([], ["none"], ["null"], ["false"])
    reference = StartingPolicy(model.policy if alone else load_model(index["init_ref"], dtype).policy)
    optimizer = torch.optim.Adam(model.parameters(), lr=c.learning_rate)
    kl_coef, after = c.init_kl_coef, weights_after(variant)
    for i, step in enumerate(run["steps"]):
        kl_coef = check_step(run, index, i, step, model, reference, optimizer, c, kl_coef, variant, (tol, stat_tol))
        weights = after.get(i + 1)
        if weights is None: continue
        for name, p in named(model):
            theirs = {our_name(n): w for n, w in weights.items()}[name]
            spots = turning(name, p, index["model_config"])
            agree(p, theirs, f"step {i + 1}: {name}", weight_tol, spots)
            if exact: agree(p, theirs, f"step {i + 1}: {name}, moved by round-off", max(weight_tol, 1e-6*c.learning_rate), ~spots)
    assert after or not (GOLDEN/f"step_{variant}.safetensors").exists()

def weights_after(variant):
    "Recorded weights by the number of steps they stand after."
    path, found = GOLDEN/f"step_{variant}.safetensors", {}
    for key, w in (load_file(path) if path.exists() else {}).items():
        m = re.fullmatch(r"after_step(\d+)\.(.+)", key)
        found.setdefault(int(m[1]), {})[m[2]] = w
    return found

def check_step(run, index, i, step, model, reference, optimizer, c, kl_coef, variant, tols):
    "One recorded step against `ppo_step`; gives the next KL coefficient."
    tol, stat_tol = tols
    what, batch = f"{variant} step {i + 1}", index["batches"][step.get("batch_index", i)]
    rows = lay_out(batch["queries"], batch["responses"], batch["scores"], run.get("pad_token_id", 0), run.get("padding_side") or "right")
    agree(rows.ids, step["input_ids"], "ids", 0); agree(rows.attention_mask, step["attention_mask"], "attention mask", 0); agree(rows.mask, step["mask"], "mask", 0)
    agree(kl_coef, step["kl_coef_before"], f"{what}: KL coefficient before", tol)
    set_learning_rate(optimizer, run, i, c)
    masks = dropout_masks(variant, i)
    if masks is not None: model.v_head.dropout = Replay(masks, c.value_dropout)
    elif c.value_dropout: pytest.fail(f"{variant} has dropout but no recorded masks")
    grads = first_gradients(model, rows, reference, c, kl_coef, step, variant, tol) if i == 0 and masks is None else None
    trace = []
    stats, after = ppo_step(model, reference, rows, optimizer, c, kl_coef, order=step["minibatch_order"], everywhere=True, trace=trace)
    assert not masks, "every recorded dropout mask is used"
    real = rows.attention_mask[:, :-1].bool()                      # positions whose own token is real
    for ours, theirs in ((stats["objective/logprobs"], "old_logprobs"), (stats["objective/ref_logprobs"], "ref_logprobs")): agree(ours, step[theirs], f"{what}: {theirs}", tol, real)
    flat = torch.cat([real[m].flatten() for m in step["minibatch_order"]])
    where = {"objective/logprobs": real, "objective/ref_logprobs": real, "ppo/policy/ratio": flat}
    check_stats(stats, step["stats"], what, stat_tol, where, complete=run["versions"].get("impl", "release") == "release")
    check_minibatches(trace, step, real, rows, what, tol, stat_tol)
    agree(after, step["kl_coef_after"], f"{what}: KL coefficient after", tol)
    return after

def set_learning_rate(optimizer, run, i, c):
    "The rate of this step: by our schedule where it is a known one (and then it must agree), else as recorded."
    rates, known = rates_of(run), schedule_of(run)
    rate = ppo_learning_rate(i + 1, c) if known else rates[i]
    agree(rate, rates[i], "learning rate", 1e-15)
    if known: agree(ppo_learning_rate(i + 2, c), rates[i + 1], "next learning rate", 1e-15)
    for group in optimizer.param_groups: group["lr"] = rate
    return rate

def check_minibatches(trace, step, real, rows, what, tol, stat_tol):
    "Every minibatch of a step, in order."
    assert [t["indices"] for t in trace] == step["minibatch_order"]
    for n, (ours, theirs) in enumerate(zip(trace, step["minibatches"])):
        pick, name = theirs["indices"], f"{what}, minibatch {n + 1}"
        spots = real[pick]
        for key, value, at in (("new_logprobs", ours["logprobs"], spots), ("new_values", ours["values"], spots), ("old_values", ours["old_values"], spots), ("rewards_in", ours["rewards"], spots),
                               ("advantages_raw", ours["advantages_raw"], None), ("advantages_whitened", ours["stats"]["policy/advantages"], None), ("returns", ours["returns"], None), ("mask", rows.mask[pick], None)):
            if key in theirs: agree(value, theirs[key], f"{name}: {key}", stat_tol if "advantages" in key or key == "returns" else tol, at)
        check_stats(ours["stats"], theirs.get("stats", {}), name, stat_tol, {"policy/ratio": spots})
        if "grad_norm" in theirs: agree(ours["norm"], theirs["grad_norm"], f"{name}: gradient norm", stat_tol)

def first_gradients(model, rows, reference, c, kl_coef, step, variant, tol):
    "The gradient of the very first minibatch, where recorded; on a copy, so that the step itself starts untouched."
    path = GOLDEN/f"step_{variant}.first_grads.safetensors"
    if not path.exists(): return
    model = copy.deepcopy(model)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    ppo_step(model, reference, rows, frozen, replace(c, max_grad_norm=c.max_grad_norm), kl_coef, order=step["minibatch_order"][:1], everywhere=True)
    theirs = {our_name(n): g for n, g in load_file(path).items()}
    for name, p in named(model): agree(p.grad, theirs[name], f"{variant}: first gradient of {name}", tol)

# ---------------------------------------------------------------- nothing overlooked

def test_every_file_is_known():
    "A file that none of the tests above reads would be a number that nobody checks."
    for path in sorted(p for p in GOLDEN.iterdir() if p.suffix in (".json", ".safetensors")):
        name = path.name
        if name.startswith("step_"): known = name.removeprefix("step_").split(".")[0] in variants()
        elif name.endswith(".safetensors"): known = name in (*forwards, read("step.json")["init_policy"], read("step.json")["init_ref"])
        else: known = name in ("step.json", "fork_compare.json") or any(name == f for f, _ in all_cases())   # fork_compare holds TRL against its fork
        assert known, f"{name} is not checked by any test"

def test_every_variant_is_complete():
    "A recorded variant that is here has steps, and the index knows it unless it comes from the fork."
    for variant in variants():
        run = read(f"step_{variant}.json")
        assert run["steps"] and run["name"] == variant
        assert variant in read("step.json")["variants"] or run["versions"].get("impl") != "release"
