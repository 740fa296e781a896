"""What runs streamcl somewhere: alerts, dashboards and their like, generated from code.

`python -m deploy` writes every generated file, `python -m deploy --check` says which of them are not as the code is.

    tools        Prometheus and promtool, from PATH or from Debian's package
    alerts       when somebody is woken, and what they do then: rules, their tests, the runbook
    panels       what a panel is
    boards       three Grafana dashboards
    catalogue    the table of metrics
"""
