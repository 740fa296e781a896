{{- define "streamcl.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* At most 40 characters: a StatefulSet's pods carry their controller's name and a hash in a label of 63. */}}
{{- define "streamcl.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := include "streamcl.name" . }}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "streamcl.selector" -}}
app.kubernetes.io/name: {{ include "streamcl.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "streamcl.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "streamcl.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "streamcl.image" -}}
{{- $tag := printf "%s%s" (default .Chart.AppVersion .Values.image.tag) (ternary "-cuda" "" (eq .Values.image.variant "cuda")) }}
{{- with .Values.image }}
{{- ternary (printf "%s@%s" .repository .digest) (printf "%s:%s" .repository $tag) (ne .digest "") }}
{{- end }}
{{- end }}

{{- define "streamcl.serviceAccountName" -}}
{{- default (ternary (include "streamcl.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- define "streamcl.claim" -}}
{{- default (printf "%s-state" (include "streamcl.fullname" .)) .Values.persistence.existingClaim }}
{{- end }}

{{/* The config that pods read, as JSON: what the chart must know of it, under what the values say. */}}
{{- define "streamcl.config" -}}
{{- $base := dict
  "telemetry" (dict "host" "0.0.0.0" "port" 9464)
  "serve" (dict "host" "0.0.0.0" "port" 8080 "in_worker" false)
  "checkpoint" (dict "folder" "/var/lib/streamcl/checkpoints")
  "shard" (dict "count" 1 "assignment" "static")
}}
{{- $given := deepCopy .Values.config }}
{{- range $name, $value := .Values.config }}
{{- if kindIs "invalid" $value }}{{- $_ := unset $given $name }}{{- end }}
{{- end }}
{{- $config := mergeOverwrite $base $given }}
{{- if eq $config.shard.assignment "group" }}
{{- $_ := set $config "shard" (merge $config.shard (dict "group_instance_id_env" "POD_NAME")) }}
{{- end }}
{{- toJson $config }}
{{- end }}

{{/* Takes a config. YAML's numbers are all floats to Helm: whole ones are written as such, for people. */}}
{{- define "streamcl.toml" -}}
{{- regexReplaceAll `(?m)^(\s*\S+ = -?[0-9]+)\.0$` (toToml .) "${1}" | trim }}
{{- end }}

{{/* What the schema can't say: values that don't fit each other. */}}
{{- define "streamcl.validate" -}}
{{- $config := include "streamcl.config" . | fromJson }}
{{- $shards := int $config.shard.count }}
{{- $shared := eq .Values.persistence.mode "shared" }}
{{- if gt (int .Values.worker.replicas) $shards }}
{{- fail (printf "worker.replicas: %d, but config.shard.count is %d: a pod without a shard has nothing to do" (int .Values.worker.replicas) $shards) }}
{{- end }}
{{- if and .Values.worker.group.enabled (or (ne (int .Values.worker.replicas) $shards) (ne $config.shard.assignment "static")) }}
{{- fail (printf "worker.group: each rank has a shard of its own; set config.shard.count to %d, and leave out config.shard.assignment" (int .Values.worker.replicas)) }}
{{- end }}
{{- if or $config.shard.index $config.shard.indices }}
{{- fail "config.shard.index, config.shard.indices: the chart gives each pod its shards; set worker.replicas and config.shard.count" }}
{{- end }}
{{- if and (eq $config.shard.assignment "group") (not $shared) (not $config.checkpoint.remote) }}
{{- fail "config.shard.assignment: a group moves shards between pods; set persistence.mode to shared, or config.checkpoint.remote" }}
{{- end }}
{{- if and .Values.replica.enabled (not $shared) }}
{{- fail "replica.enabled: replicas read the workers' checkpoints; set persistence.mode to shared" }}
{{- end }}
{{- if and .Values.persistence.existingClaim (not $shared) }}
{{- fail "persistence.existingClaim: one claim is for the mode shared; perPod makes its own" }}
{{- end }}
{{- if not (hasPrefix "/var/lib/streamcl/" $config.checkpoint.folder) }}
{{- fail (printf "config.checkpoint.folder: %s is not below /var/lib/streamcl, where the volume is mounted" $config.checkpoint.folder) }}
{{- end }}
{{- range $where, $host := dict "telemetry.host" $config.telemetry.host "serve.host" $config.serve.host }}
{{- if has $host (list "127.0.0.1" "localhost" "::1") }}
{{- fail (printf "config.%s: probes and scrapes come from outside of the pod, which %s does not hear" $where $host) }}
{{- end }}
{{- end }}
{{- if eq (int $config.telemetry.port) 0 }}
{{- fail "config.telemetry.port: 0 switches off what the probes ask" }}
{{- end }}
{{- if eq (int $config.serve.port) 0 }}
{{- fail "config.serve.port: 0 is any port, which no Service can name" }}
{{- end }}
{{- if and $config.serve.in_worker (lt (int .Values.worker.replicas) $shards) }}
{{- fail (printf "config.serve.in_worker: needs one shard in a pod; set worker.replicas to %d" $shards) }}
{{- end }}
{{- if and .Values.replica.autoscaling.enabled .Values.replica.keda.enabled }}
{{- fail "replica.autoscaling, replica.keda: two that scale one Deployment undo each other; enable one" }}
{{- end }}
{{- if and .Values.replica.keda.enabled (not .Values.replica.keda.triggers) }}
{{- fail "replica.keda.triggers: KEDA needs one" }}
{{- end }}
{{- range $station := list "kafka" "registry" "serve" }}
{{- range $setting, $value := default (dict) (get $config $station) }}
{{- if and (kindIs "string" $value) (hasPrefix "/etc/streamcl/secrets/" $value) }}
{{- $name := index (splitList "/" $value) 4 }}
{{- if not (hasKey $.Values.existingSecrets $name) }}
{{- fail (printf "config.%s.%s: %s, but existingSecrets has no %s" $station $setting $value $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* "", or "-INDEX" where there are several shards, as in the names of their topics. Takes (list . index). */}}
{{- define "streamcl.ofShard" -}}
{{- $config := include "streamcl.config" (first .) | fromJson }}
{{- if gt (int $config.shard.count) 1 }}-{{ last . }}{{ end }}
{{- end }}

{{- define "streamcl.podMeta" -}}
annotations:
  checksum/config: {{ include (print .root.Template.BasePath "/configmap.yaml") .root | sha256sum }}
  {{- with .values.annotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
labels:
  {{- /* The selector's alone: a version of the chart that changes nothing else must restart nothing. */}}
  {{- include "streamcl.selector" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .values.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "streamcl.podSpec" -}}
serviceAccountName: {{ include "streamcl.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
terminationGracePeriodSeconds: {{ .values.terminationGracePeriodSeconds }}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- with get $.values $name }}
{{ $name }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "streamcl.container" -}}
image: {{ include "streamcl.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- end }}

{{- define "streamcl.mounts" -}}
- {name: config, mountPath: /etc/streamcl/config, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- range $name, $_ := .Values.existingSecrets }}
- {name: secret-{{ $name }}, mountPath: /etc/streamcl/secrets/{{ $name }}, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "streamcl.volumes" -}}
- name: config
  configMap:
    name: {{ include "streamcl.fullname" . }}
- name: tmp
  emptyDir: {}
{{- range $name, $secret := .Values.existingSecrets }}
- name: secret-{{ $name }}
  secret:
    secretName: {{ $secret }}
    defaultMode: 0440
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Takes a dict: probes, port, scheme, and the path of each. */}}
{{- define "streamcl.probes" -}}
{{- range $name := list "startup" "readiness" "liveness" }}
{{ $name }}Probe:
  httpGet:
    path: {{ get $.paths $name }}
    port: {{ $.port }}
    scheme: {{ $.scheme }}
  {{- toYaml (get $.probes $name) | nindent 2 }}
{{- end }}
{{- end }}

{{/* As JSON lists in a dict: the ports that the config's URLs of brokers and registry name. */}}
{{- define "streamcl.kafkaPorts" -}}
{{- $config := include "streamcl.config" . | fromJson }}
{{- $urls := list (dig "events" "url" "" $config) (dig "labels" "url" "" $config) (dig "deltas" "url" "" $config) (dig "registry" "url" "" $config) }}
{{- range $name := list "predictions" "outcomes" "dead_letters" "control" "commands" }}
{{- $urls = append $urls (default "" (get $config $name)) }}
{{- end }}
{{- $ports := .Values.networkPolicy.kafkaPorts }}
{{- range $url := $urls }}
{{- $parts := splitList "/" $url }}
{{- if and (gt (len $parts) 2) (has (first $parts) (list "kafka:" "http:" "https:")) }}
{{- $default := dict "kafka:" 9092 "http:" 80 "https:" 443 }}
{{- range $server := splitList "," (index $parts 2) }}
{{- $port := regexFind ":[0-9]+$" $server | trimPrefix ":" }}
{{- $ports = append $ports (int (default (get $default (first $parts)) $port)) }}
{{- end }}
{{- end }}
{{- end }}
{{- $sorted := dict }}
{{- range $ports }}{{- $_ := set $sorted (printf "%05d" (int .)) (int .) }}{{- end }}
{{- $found := list }}
{{- range keys $sorted | sortAlpha }}{{- $found = append $found (get $sorted .) }}{{- end }}
{{- dict "ports" $found | toJson }}
{{- end }}
