"""The HTML of reports: the style of all pages, and the page about one run or several.

PAGE is a Jinja template; `run_report.write_report` fills it in. The study's page is in
`study/report.py`.
"""

from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #57606a; --paper: #fff; --card: #f6f8fa;
  --line: #d0d7de; --good: #00664b; --bad: #a33d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #d7dade; --soft: #9aa4ae; --paper: #16191d;
  --card: #1f242a; --line: #3a424b; --good: #2dc89b; --bad: #f0a15a; } }
body { margin: 2rem auto; max-width: 64rem; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; }
p, figcaption { color: var(--soft); margin: .3rem 0; }
figure, .wide { margin: 0; overflow-x: auto; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } .name { text-align: left; }
.first { color: var(--soft); } .last { font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: 13px; }
details > pre, .box { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem .8rem; margin: .4rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 0 1rem; }
.pair > p { grid-column: 1 / -1; } .right { color: var(--good); } .wrong { color: var(--bad); }
small { color: var(--soft); } summary { cursor: pointer; }
"""

PAGE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Training report: {{ runs | map(attribute="name") | join(", ") }}</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<h1>Training report</h1>
{% for run in runs %}
<p><b>{{ run.name }}</b>: {{ run.steps }} training steps, {{ run.evaluations }} evaluations
{%- if not run.evaluations %}; the table shows its training batches{% endif %}</p>
{% endfor %}

<h2>First → last evaluation</h2>
<div class="wide"><table>
<tr><th class="name">run</th><th class="name">mode</th>
{% for column in columns %}<th>{{ title(column) }}</th>{% endfor %}</tr>
{% for run in runs %}{% for mode, ends in run.ends.items() %}
<tr><td class="name">{{ run.name }}</td><td class="name">{{ mode_label(mode) }}</td>
{% for column in columns %}
<td><span class="first">{{ number(ends.first.get(column), column) }} →</span>
<span class="last">{{ number(ends.last.get(column), column) }}</span></td>
{% endfor %}</tr>
{% endfor %}{% endfor %}
</table></div>
<p>Entropy and KL are means per response token. KL is that of a mode to the normal mode, of that to
high-entropy. – means not measured.</p>

<h2>Curves</h2>
<figure><picture><source srcset="{{ curves.dark }}" media="(prefers-color-scheme: dark)">
<img src="{{ curves.light }}"
  alt="Accuracy, entropy, unique right answers and KL between the modes by training step">
</picture></figure>

<h2>Seconds per phase</h2>
<div class="pair">
{% for name, phases in seconds.items() %}
<div><h3>{{ name }}</h3>
{% if phases %}
<table><tr><th class="name">phase</th><th>total (s)</th><th>mean (s)</th></tr>
{% for row in phases %}
<tr><td class="name">{{ row.phase }}</td><td>{{ "%.1f" | format(row.total) }}</td>
<td>{{ "%.3f" | format(row.mean) }}</td></tr>
{% endfor %}
</table>
{% else %}<p>No times were logged.</p>{% endif %}
</div>
{% endfor %}
</div>

<h2>Sample responses</h2>
{% for run in runs %}
<h3>{{ run.name }}</h3>
{% if run.samples %}
<p>From {{ run.samples.file }}. Prompts are those of the normal mode.</p>
{% for question in run.samples.questions %}
<div class="box"><pre>{{ question.prompt }}</pre><small>answer: {{ question.answer }}</small></div>
<div class="pair">
{% for mode, responses in question.modes.items() %}
<div{% if question.modes | length == 1 %} class="pair"{% endif %}>
<p><b>{{ mode_label(mode) }} mode</b></p>
{% for sample in responses %}
<div class="box"><pre>{{ sample.response }}</pre>
<small><b class="{{ "right" if sample.right else "wrong" }}">reward {{ sample.reward_text }}</b>,
{{ sample.tokens | length }} tokens, finish: {{ sample.finish_reason }}
{%- if sample.reward_error %}, reward error: {{ sample.reward_error }}{% endif %}</small></div>
{% endfor %}</div>
{% endfor %}
</div>
{% endfor %}
{% else %}<p>No rollout dump (log.rollouts=false).</p>{% endif %}
{% endfor %}

{% if notes %}
<h2>Left out</h2>
{% for text in notes %}<p>{{ text }}</p>
{% endfor %}{% endif %}

<h2>Configuration</h2>
{% for run in runs %}
<details><summary>{{ run.name }}</summary>
<pre>{{ run.config if run.config is not none
  else "config.yaml is not in the run directory" }}</pre></details>
{% endfor %}
</body>
</html>
"""
)


def is_page(file: Path) -> bool:
    """Whether a file is a report of ours, of a run or of a study: its page begins with STYLE."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        return STYLE[:60] in stream.read(4096)
