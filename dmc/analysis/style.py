"""The page of a report: its head and its looks, in light and in dark."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h4 { margin: 1rem 0 .3rem; }
p, ul { max-width: 52rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-end; overflow-x: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; white-space: nowrap; }
caption small { font-weight: 400; }
th { font-weight: 400; text-align: right; padding: 1px 6px; }
.heat td { min-width: 2.6em; text-align: center; padding: 1px 3px; }
.heat thead th { text-align: center; }
.numbers td, .numbers th { border-bottom: 1px solid var(--line); padding: 2px 8px; vertical-align: top; }
.numbers td { text-align: right; overflow-wrap: anywhere; }
.numbers tr > :nth-child(2):last-child { text-align: left; }
figure { margin: 1rem 0; max-width: 60rem; }
figure svg { width: 100%; height: auto; display: block; }
figure svg.columns1 { max-width: 36rem; }
details { margin: .4rem 0; }
summary { cursor: pointer; }
.text { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft);
        border-radius: 4px; padding: .7rem; margin: 0; max-width: none; color: #111; }
.text span { border-radius: 3px; padding: 2px 1px; border-left: 2px solid #0007; }
.text span:hover { outline: 2px solid currentColor; }
.e0 { background: #f6b9b9; } .e1 { background: #f7d9a4; } .e2 { background: #efe98f; }
.e3 { background: #bfe6b0; } .e4 { background: #aadfe6; } .e5 { background: #c9c4f2; }
</style>
</head>
<body>
<h1>@TITLE@</h1>
@BODY@
</body>
</html>
"""
