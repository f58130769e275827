"""The report in a real browser: nothing that a model wrote runs, a hundred thousand samples stay quick, a phone can show it."""
import itertools, json, shutil, subprocess, time, urllib.request
from pathlib import Path

import numpy as np, pytest

from superhf.ppo import PPOConfig
from superhf.report import make_report
from superhf.runs import RunFolder
from superhf.training import SuperHFConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
ATTACKS = ["<script>document.title = 'owned'</script>", "<img src=x onerror=\"document.title = 'owned'\">", "</script><script>document.title = 'owned'</script>",
           "<svg onload=\"document.title = 'owned'\">", "javascript:document.title='owned'", "{{constructor.constructor('document.title=1')()}}", "\u2028\u2029 & &lt;b&gt;", "plain"]

def make_run(folder, steps, S, kind=SuperHFConfig, **config):
    "A run folder with made-up numbers, whose prompts and completions try to run."
    run, rng = RunFolder(folder).create(kind(superbatches=steps, **config)), np.random.default_rng(0)
    # 0.226: its moving average differs from it by rounding, which is no range to draw ticks in
    metrics = [{"step": t, "reward/mean": float(rng.normal()), "reward/ema": t/steps, "kl": t/steps, "ended/share": 0.226} for t in range(1, steps + 1)]
    scores = rng.normal(size=(steps, S))
    samples = [dict(step=t, index=i, source="ab"[t % 2], prompt=f"Question {t}? {ATTACKS[t % 8]}", completion=f"Answer {t}.{i}. {ATTACKS[i % 8]} " + "and so on "*20,
                    score=float(scores[t - 1, i]), selected=bool(i == scores[t - 1].argmax()), ended=True) for t in range(1, steps + 1) for i in range(S)]
    for path, records in ((run.metrics, metrics), (run.samples, samples)): path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return run

class Browser:
    "A page in headless Chromium, steered over its debugging port."
    def __init__(self, folder):
        self.folder, self.ids = folder, itertools.count(1)
        self.process = subprocess.Popen([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                                         "--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.socket = None

    def start(self):
        from websocket import create_connection
        port = self.eventually(lambda: (Path(self.folder)/"DevToolsActivePort").read_text().split()[0])
        target = next(t for t in self.eventually(lambda: json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))) if t["type"] == "page")
        self.socket = create_connection(target["webSocketDebuggerUrl"], timeout=60)
        return self

    def eventually(self, get, seconds=60):
        end = time.time() + seconds
        while True:
            try:
                if (found := get()): return found
            except (OSError, IndexError, StopIteration): pass
            if time.time() > end: raise TimeoutError("the browser did not answer")
            time.sleep(0.05)

    def call(self, method, **params):
        n = next(self.ids)
        self.socket.send(json.dumps(dict(id=n, method=method, params=params)))
        while (reply := json.loads(self.socket.recv())).get("id") != n: pass
        return reply["result"]

    def ask(self, script):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, path, width=1200):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url=f"file://{path}")
        self.eventually(lambda: self.ask(f"location.href.endsWith({json.dumps(Path(path).name)}) && document.documentElement.dataset.ready"))

    def close(self):
        if self.socket: self.socket.close()
        self.process.kill(); self.process.wait()

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("websocket", reason="no websocket-client")
    b = Browser(tmp_path_factory.mktemp("chromium"))
    try: yield b.start()
    finally: b.close()

def write(path, *runs):
    path.write_text(make_report(list(runs)), encoding="utf-8")
    return path

def rows(browser): return browser.ask("document.querySelectorAll('#samples .sample').length")
def choose(browser, name, value): browser.ask(f"(() => {{ const x = document.getElementById('{name}'); if (x.type === 'checkbox') x.checked = {json.dumps(value)}; else x.value = {json.dumps(value)}; x.dispatchEvent(new Event('input', {{bubbles: true}})); }})()")
def count(browser): return int(browser.ask("document.getElementById('count').textContent").split()[0])

def test_nothing_that_a_model_wrote_runs(browser, tmp_path):
    run = make_run(tmp_path/"run<b>", 8, 8)
    browser.open(write(tmp_path/"hostile.html", run.path))
    title = browser.ask("document.title")
    time.sleep(0.5)
    assert browser.ask("document.title") == title and title.endswith("run<b>")
    assert browser.ask("document.querySelectorAll('main script, main img, #samples svg, main a').length") == 0
    assert browser.ask("document.scripts.length") == 2 and rows(browser) == 25
    said = browser.ask("[...document.querySelectorAll('#samples .said')].map(x => x.textContent).join(' ')")
    for attack in ATTACKS: assert attack in said    # shown to the letter

def test_samples_can_be_found(browser, tmp_path):
    a, b = make_run(tmp_path/"a", 6, 8), make_run(tmp_path/"b", 6, 8, reward_model="demo-heldout")
    browser.open(write(tmp_path/"find.html", a.path, b.path))
    assert count(browser) == 96 and "cannot be compared" in browser.ask("document.getElementById('warnings').textContent")
    for name, value, left in (("run", "1", 48), ("source", "0", 24), ("step", "3", 8), ("selected", True, 1)):
        choose(browser, name, value)
        browser.eventually(lambda: count(browser) == left)
    for name, value in (("run", ""), ("source", ""), ("step", ""), ("selected", False), ("text", "answer 2.5")): choose(browser, name, value)
    browser.eventually(lambda: count(browser) == 2)
    choose(browser, "text", ""); choose(browser, "order", "best")
    browser.eventually(lambda: count(browser) == 96)
    scores = [float(x.split("score ")[1].split(" ")[0]) for x in browser.ask("[...document.querySelectorAll('#samples .sample > .quiet')].map(x => x.textContent)")]
    assert scores == sorted(scores, reverse=True)
    browser.ask("document.getElementById('next').click()")
    assert browser.ask("document.getElementById('page').textContent") == "page 2 of 4"

def test_an_outlier_stays_in_its_chart(browser, tmp_path):
    run = make_run(tmp_path/"spike", 4500, 1)
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    records[1]["reward/mean"] = 1e6
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    browser.open(write(tmp_path/"spike.html", run.path))
    at = browser.ask("[...document.querySelectorAll('#curves circle')].map(c => Number(c.getAttribute('cy')))")
    assert len(at) >= 4500 and 0 <= min(at) and max(at) <= 200

def test_numbers_are_told_apart(browser, tmp_path):
    run = make_run(tmp_path/"numbers", 20, 1)
    records = [json.loads(line) | {"reward/mean": 250 + i/25, "reward/ema": 250 + i/25} for i, line in enumerate(run.metrics.read_text().splitlines())]
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    browser.open(write(tmp_path/"numbers.html", run.path))
    ticks = browser.ask("[...document.querySelector('#curves svg').querySelectorAll('text[text-anchor=end]')].map(t => t.textContent)")
    assert len(ticks) > 2 and len(set(ticks)) == len(ticks)
    assert browser.ask("[number(1234), number(1234.567), number(0.12345), number(null)].join(' ')") == "1234 1230 0.123 –"

def test_nothing_is_selected_in_ppo(browser, tmp_path):
    run = make_run(tmp_path/"ppo", 6, 8, PPOConfig)
    browser.open(write(tmp_path/"ppo.html", run.path))
    assert rows(browser) == 25 and browser.ask("document.querySelectorAll('#samples .chosen').length") == 0
    assert "phrases that win" not in browser.ask("document.getElementById('gaming').textContent")

def test_a_phone_shows_it_whole(browser, tmp_path):
    run = make_run(tmp_path/("a-rather-long-name-for-a-run-"*3), 6, 8)
    browser.open(write(tmp_path/"phone.html", run.path), width=390)
    assert browser.ask("innerWidth") == 390
    assert browser.ask("document.documentElement.scrollWidth") <= 390

def test_a_hundred_thousand_samples(browser, tmp_path):
    run = make_run(tmp_path/"big", 3125, 32)
    path = write(tmp_path/"big.html", run.path)
    browser.open(path)
    assert count(browser) == 100_000 and rows(browser) == 25
    started = browser.ask("performance.now()")
    choose(browser, "text", "answer 3000.7."); browser.eventually(lambda: count(browser) == 1)
    print(f"{path.stat().st_size/2**20:.0f} MiB, ready after {browser.ask('document.documentElement.dataset.ready')} ms, search {browser.ask('performance.now()') - started:.0f} ms")
