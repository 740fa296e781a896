"""What runs streamcl elsewhere: images, a compose file, Prometheus, Grafana, the Helm chart. Not part of the package.

chart     writes what of helm/streamcl follows from the code and from values.yaml
values    what the chart may be told
go_tools  builds the tools that only tests need
"""
