"""What runs streamcl elsewhere: images, a compose file, Prometheus, Grafana, the Helm chart. Not part of the package.

`python -m deploy` writes alerts, dashboards, the runbook and the table of metrics; `python -m deploy.chart` the rest.

alerts     when somebody is woken, and what they do then: rules, their tests, the runbook
panels     what a panel is
boards     three Grafana dashboards
catalogue  the table of metrics
generated  every file of those, and whether it is as the code is
chart      writes what of helm/streamcl follows from the code and from values.yaml
values     what the chart may be told
tools      Prometheus and promtool, from PATH or from Debian's package
go_tools   builds the tools that only tests need
"""
