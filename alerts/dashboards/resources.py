"""The resources dashboard: replicas, load, GPUs, nodes, processes and Ray Serve."""

from __future__ import annotations

from alerts.dashboards.panels import Dashboard, Panel, Variable
from alerts.dashboards.promql import (
    DEPLOYMENT,
    MODEL,
    bucket,
    maximum,
    on_node,
    per_second,
    quantile,
    quantiles,
    ratio,
    threshold,
    total,
)

REPLICA = ("model", "replica")
REPLICA_LEGEND = "{{model}} {{replica}}"
NODE = ("instance",)
MIB = 2**20  # Ray documents the memory of GPUs as bytes, but the unit is MiB
# Ray Serve's numbers of deployment and proxy states.
STATUS = {
    0: ("unknown", "text"),
    1: ("deploy failed", "red"),
    2: ("unhealthy", "red"),
    3: ("updating", "blue"),
    4: ("upscaling", "blue"),
    5: ("downscaling", "blue"),
    6: ("healthy", "green"),
}
PROXY = {
    1: ("starting", "blue"),
    2: ("healthy", "green"),
    3: ("unhealthy", "red"),
    4: ("draining", "blue"),
    5: ("drained", "text"),
}
CPUS = 'Name="CPU"'
CPUS_USED = f'{CPUS}, State="USED"'
YES_NO = {0: ("no", "red"), 1: ("yes", "green")}
IN_STATE = {0: (" ", "transparent"), 1: ("active", "blue")}


def _by_node(metric: str, where: str = "", by: tuple[str, ...] = NODE) -> str:
    return f"max by ({', '.join(by)}) {on_node(metric, where)}"


REPLICAS = (
    Panel(
        "Ready replicas",
        "Ready replicas, the number that the load needs (desired), and the number that Ray Serve starts (target). If"
        " desired is above ready for long, the cluster is full or max_replicas is the limit.",
        "short",
        (
            (f"max by (model) (serve_app_ready_replicas{{{MODEL}}})", "{{model}} ready"),
            (maximum("ray_serve_autoscaling_desired_replicas", ("deployment",), DEPLOYMENT), "{{deployment}} desired"),
            (maximum("ray_serve_autoscaling_target_replicas", ("deployment",), DEPLOYMENT), "{{deployment}} target"),
        ),
        alerts=("NoReadyReplicas", "ReplicasTooFew", "DeploymentWithoutReplica"),
    ),
    Panel(
        "Healthy replicas and reporting engines",
        "Replicas that pass Ray's health check, and engines that send metrics. An engine without a healthy replica "
        "will be replaced. A line that rises and falls repeatedly is a replica that crashes.",
        "short",
        (
            (
                "sum by (deployment) (max by (deployment, replica) "
                f"(ray_serve_deployment_replica_healthy{{{DEPLOYMENT}}}))",
                "{{deployment}} healthy",
            ),
            (f"serve_app:replicas:count{{{MODEL}}}", "{{model}} engines"),
        ),
        alerts=("ReplicasFlap",),
    ),
    Panel(
        "Deployment status",
        "Ray Serve's status of each deployment. A model that has scaled to zero is healthy. A deployment that stays "
        "blue for minutes does not start.",
        "short",
        ((maximum("ray_serve_deployment_status", ("deployment",), DEPLOYMENT), "{{deployment}}"),),
        "states",
        alerts=("DeploymentWithoutReplica", "DeployFailed"),
        value_names=STATUS,
    ),
    Panel(
        "Model states",
        "Ready, loading, asleep (scaled to zero) or failed. If a model has failed, /ready contains the reason, and "
        "Ray tries again.",
        "short",
        ((f"max by (model, state) (serve_app_model_state{{{MODEL}}}) == 1", "{{model}} {{state}}"),),
        "states",
        alerts=("ScaleFromZeroSlow",),
        value_names=IN_STATE,
    ),
    Panel(
        "Load time",
        "Time that each engine took to load, and of it the phases. A new replica and a start from zero take this time.",
        "s",
        (
            (maximum("serve_app_model_load_seconds", REPLICA), REPLICA_LEGEND),
            (maximum("serve_app_model_load_phase_seconds", ("model", "phase")), "{{model}} {{phase}}"),
        ),
        alerts=("ScaleFromZeroSlow",),
    ),
    Panel(
        "Start from zero",
        "Time from the first request to a model at zero replicas until the model was ready, over the last hour. "
        "Above the threshold, requests without streaming got status 503: keep a replica or load faster.",
        "s",
        tuple(
            (
                f"histogram_quantile({one}, sum by (le, model) "
                f"(increase(serve_app_model_wake_seconds_bucket{{{MODEL}}}[1h])))",
                f"{{{{model}}}} p{float(one) * 100:g}",
            )
            for one in ("0.5", "0.99")
        ),
        thresholds=(bucket("ScaleFromZeroSlow"),),
        alerts=("ScaleFromZeroSlow",),
    ),
)

LOAD = (
    Panel(
        "Active requests",
        "Requests that have arrived and have not ended, and open HTTP calls.",
        "short",
        (
            (total("serve_app_active_requests"), "{{model}} requests"),
            (total("serve_app_http_open_requests", ("replica",), ""), "{{replica}} HTTP"),
        ),
    ),
    Panel(
        "Queue",
        "Requests that wait at the ingresses or in the engines, and slots. If as many wait as there are slots for "
        "minutes, the last one waits as long as a whole response takes.",
        "short",
        (
            (f"serve_app:queue_depth:sum{{{MODEL}}}", "{{model}} waiting"),
            (f"serve_app:slots:sum{{{MODEL}}}", "{{model}} slots"),
        ),
        alerts=("QueueLong",),
    ),
    Panel(
        "Running sequences by replica",
        "Running sequences of each replica. If the replicas differ much, requests are not distributed evenly.",
        "short",
        ((maximum("serve_app_running_sequences", REPLICA), REPLICA_LEGEND),),
    ),
    Panel(
        "Ray: queued and processing",
        "Requests in the queues of Ray's handles and in its replicas. If requests are queued both here and in the "
        "engine, max_ongoing_requests is too low.",
        "short",
        (
            (
                f"sum by (deployment) (ray_serve_deployment_queued_queries{{{DEPLOYMENT}}})",
                "{{deployment}} queued",
            ),
            (
                f"sum by (deployment) (ray_serve_replica_processing_queries{{{DEPLOYMENT}}})",
                "{{deployment}} processing",
            ),
        ),
        width=12,
    ),
    Panel(
        "Ongoing requests for autoscaling",
        "Ongoing requests of a deployment. With target_ongoing_requests, Ray divides them by it to get the number of "
        "replicas.",
        "short",
        ((maximum("ray_serve_autoscaling_total_requests", ("deployment",), DEPLOYMENT), "{{deployment}}"),),
        alerts=("ReplicasTooFew",),
        width=12,
    ),
    Panel(
        "Bytes sent by route",
        "Bytes of response bodies. A token frame of a stream has a few hundred bytes. A jump without more tokens "
        "means large responses.",
        "Bps",
        ((per_second("serve_app_http_sent_bytes_total", ("route",), ""), "{{route}}"),),
        stacked=True,
        width=12,
    ),
    Panel(
        "Bytes received by route",
        "Bytes of request bodies. A jump here comes before a jump of prefill time.",
        "Bps",
        ((per_second("serve_app_http_received_bytes_total", ("route",), ""), "{{route}}"),),
        stacked=True,
        width=12,
    ),
)

GPUS = (
    Panel(
        "GPU utilisation",
        "Share of the time in which a kernel ran. Above the threshold for long there is no spare capacity.",
        "percentunit",
        (('serve_app:gpu_utilization:ratio{node=~"$node"}', "{{node}} {{gpu}}"),),
        thresholds=(threshold("GPUUtilizationHigh"),),
        alerts=("GPUUtilizationHigh",),
        maximum=1,
    ),
    Panel(
        "GPU memory usage",
        "Share of the memory of each GPU in use. Above the threshold the next allocation may end a replica: lower "
        "kv_memory_fraction.",
        "percentunit",
        (('serve_app:gpu_memory:ratio{node=~"$node"}', "{{node}} {{gpu}}"),),
        thresholds=(threshold("GPUMemoryNearlyFull"),),
        alerts=("GPUMemoryNearlyFull",),
        maximum=1,
    ),
    Panel(
        "GPU memory, bytes",
        "Memory in use, measured by the replicas with NVML and by Ray's node agents.",
        "bytes",
        (
            ('max by (node, gpu) (serve_app_gpu_memory_used_bytes{node=~"$node"})', "{{node}} {{gpu}} used"),
            (f"{MIB} * {_by_node('ray_node_gram_used', by=('ip', 'GpuIndex'))}", "{{ip}} {{GpuIndex}} used, by Ray"),
        ),
        alerts=("GPUMemoryNearlyFull",),
    ),
)

NODE_PANELS = (
    Panel(
        "CPU usage of nodes",
        "Share of all cores. A busy model on the CPU uses all cores that it may. With a GPU the CPU usage should "
        "stay low.",
        "percent",
        ((_by_node("ray_node_cpu_utilization"), "{{instance}}"),),
        maximum=100,
    ),
    Panel(
        "Memory usage of nodes",
        "Share of the memory of a node or of its control group. Close to 100 % Ray kills the youngest worker process.",
        "percentunit",
        (
            (
                f"{_by_node('ray_node_mem_used')} / {_by_node('ray_node_mem_total')}",
                "{{instance}}",
            ),
        ),
        maximum=1,
    ),
    Panel(
        "Network traffic of nodes",
        "Bytes per second over all network interfaces. Tokens need little bandwidth. High traffic means that a model"
        " is downloaded.",
        "Bps",
        (
            (_by_node("ray_node_network_receive_speed"), "{{instance}} received"),
            (_by_node("ray_node_network_send_speed"), "{{instance}} sent"),
        ),
    ),
    Panel(
        "Disk usage",
        "Share of each disk in use, measured by node_exporter or Ray. A full disk stops logs, object spilling and "
        "model downloads.",
        "percentunit",
        (
            ('1 - serve_app:disk_free:ratio{instance=~"$node"}', "{{instance}} {{mountpoint}}"),
            (
                f"{_by_node('ray_node_disk_usage')} / "
                f"({_by_node('ray_node_disk_usage')} + {_by_node('ray_node_disk_free')})",
                "{{instance}} /, by Ray",
            ),
        ),
        thresholds=(round(1 - threshold("DiskNearlyFull"), 4),),
        alerts=("DiskNearlyFull",),
        maximum=1,
    ),
    Panel(
        "Disk traffic",
        "Bytes read and written per second. Reading for minutes after a start means that a model is loading.",
        "Bps",
        (
            (_by_node("ray_node_disk_io_read_speed"), "{{instance}} read"),
            (_by_node("ray_node_disk_io_write_speed"), "{{instance}} written"),
        ),
    ),
    Panel(
        "Object store",
        "Ray's shared memory in use, and spilled to disk. The service hardly uses it, so growth means objects of "
        "other applications.",
        "bytes",
        (
            (_by_node("ray_object_store_used_memory"), "{{instance}} used"),
            (_by_node("ray_object_store_memory", 'Location="SPILLED"'), "{{instance}} spilled"),
        ),
    ),
    Panel(
        "Reserved CPUs",
        "CPUs of each node that replicas have reserved, and all CPUs of the node. If all are reserved, no further "
        "replica fits. A line that ends is a node that has disappeared.",
        "short",
        (
            (f"sum by (instance) {on_node('ray_resources', CPUS_USED)}", "{{instance}} reserved"),
            (f"sum by (instance) {on_node('ray_resources', CPUS)}", "{{instance}} total"),
        ),
        alerts=("NodeLost",),
        width=24,
    ),
)

PROCESSES = (
    Panel(
        "CPU usage of processes",
        "Cores that each process uses. An ingress replica close to 1 is the bottleneck.",
        "short",
        ((per_second("process_cpu_seconds_total", REPLICA), REPLICA_LEGEND),),
    ),
    Panel(
        "Memory of processes",
        "Resident memory and address space of each process. Resident memory that only rises is a leak. The address "
        "space includes slots that were never used.",
        "bytes",
        (
            (maximum("process_resident_memory_bytes", REPLICA), f"{REPLICA_LEGEND} resident"),
            (maximum("process_virtual_memory_bytes", REPLICA), f"{REPLICA_LEGEND} address space"),
        ),
    ),
    Panel(
        "Open files",
        "Share of the allowed open files and connections of a process. At 1 it accepts no new connection: raise the "
        "limit.",
        "percentunit",
        ((ratio(maximum("process_open_fds", REPLICA), maximum("process_max_fds", REPLICA)), REPLICA_LEGEND),),
        maximum=1,
    ),
    Panel(
        "Event loop delay",
        "Delay of the event loop of each process. Above 50 ms all its streams stutter, because some code blocks the "
        "loop.",
        "s",
        ((maximum("serve_app_event_loop_lag_seconds", REPLICA), REPLICA_LEGEND),),
    ),
    Panel(
        "Age of the metrics",
        "Age of the newest metrics that each process has sent. After 5 s without metrics a process is removed, and "
        "its lines end.",
        "s",
        ((maximum("serve_app_snapshot_age_seconds", REPLICA), REPLICA_LEGEND),),
    ),
    Panel(
        "Uptime",
        "Time since each process started. A drop to 0 means that the process was replaced.",
        "s",
        ((f"time() - {maximum('process_start_time_seconds', REPLICA)}", REPLICA_LEGEND),),
        alerts=("ReplicasFlap",),
    ),
    Panel(
        "Metrics are complete",
        "Whether every process has had time to report its metrics to the ingress that was scraped. An ingress that has "
        "just started has the metrics of some processes only.",
        "short",
        (("max(serve_app_metrics_complete)", "complete"),),
        "states",
        value_names=YES_NO,
    ),
    Panel(
        "Versions",
        "Versions of the running software. Two rows mean a rollout in progress, or one that stopped.",
        "short",
        (("max by (version, python, ray, torch, transformers) (serve_app_build_info)", ""),),
        "table",
    ),
    Panel(
        "Runners",
        "`fused` is the fast CPU path, `transformers` the Hugging Face path. `transformers` for a Llama-like model on"
        " a CPU means that no compiler was found or a self-test failed.",
        "short",
        ((f"max by (model, replica, kind, quantization) (serve_app_runner_info{{{MODEL}}})", ""),),
        "table",
    ),
)

SERVE = (
    Panel(
        "Ray: HTTP by status",
        "HTTP calls at Ray's proxy by status. 5xx here but not in the metrics of the service means that the proxy "
        "had no ingress replica.",
        "reqps",
        (("sum by (status_code) (rate(ray_serve_num_http_requests_total[$__rate_interval]))", "{{status_code}}"),),
        alerts=("ServiceDown",),
        stacked=True,
    ),
    Panel(
        "Ray: HTTP time",
        "HTTP time at Ray's proxy by route. The difference to HTTP time by route is the time of the proxy and the "
        "network.",
        "ms",
        quantiles("ray_serve_http_request_latency_ms", ("route",), "", ("0.5", "0.99")),
    ),
    Panel(
        "Ray: health checks",
        "Time that replicas take to answer Ray's health check. Close to the timeout a replica will be replaced.",
        "ms",
        ((quantile("0.99", "ray_serve_health_check_latency_ms", ("deployment",), DEPLOYMENT), "{{deployment}} p99"),),
    ),
    Panel(
        "Ray: event loops",
        "Delay of the event loops of Ray's proxy and replicas.",
        "ms",
        ((quantile("0.99", "ray_serve_event_loop_scheduling_latency_ms", ("component",), ""), "{{component}} p99"),),
        width=12,
    ),
    Panel(
        "Ray: replica start time",
        "Time from Ray's decision to start a replica until it is ready, over all starts in this cluster.",
        "ms",
        (
            (
                "histogram_quantile(0.9, sum by (le, deployment) "
                f"(ray_serve_replica_startup_latency_ms_bucket{{{DEPLOYMENT}}}))",
                "{{deployment}} p90",
            ),
        ),
        alerts=("ScaleFromZeroSlow",),
        width=12,
    ),
    Panel(
        "Ray: proxies",
        "State of the proxy of each node. An unhealthy proxy rejects the requests that reach its node.",
        "short",
        (("max by (node_ip_address) (ray_serve_proxy_status)", "{{node_ip_address}}"),),
        "states",
        alerts=("ServiceDown",),
        value_names=PROXY,
        width=12,
    ),
    Panel(
        "Ray: controller loop time",
        "Duration of the control loop of Ray Serve's controller. Above one second health checks and scaling are late.",
        "s",
        (("max(ray_serve_controller_control_loop_duration_s)", "control loop"),),
        width=12,
    ),
)

# The node of an alert is a host name (NVML), an address (Ray's GPUs) or the instance of a scrape target. The variable
# offers all three.
NODES = (
    'query_result(group by (node) (label_replace(ray_node_mem_total, "node", "$1", "instance", "(.*)"))'
    ' or group by (node) (label_replace(ray_node_mem_total, "node", "$1", "ip", "(.*)"))'
    " or group by (node) (serve_app_gpu_memory_total_bytes))"
)

DASHBOARD = Dashboard(
    uid="serve-app-resources",
    title="serve_app: resources and Ray",
    description="Replicas, load, GPUs, nodes, processes and Ray Serve.",
    variables=(
        Variable("model", "Model", "label_values(serve_app_model_state, model)"),
        Variable("deployment", "Deployment", "label_values(ray_serve_deployment_status, deployment)"),
        Variable("node", "Node", NODES, '/node="([^"]+)"/'),
    ),
    rows={
        "Replicas and models": REPLICAS,
        "Load": LOAD,
        "GPUs": GPUS,
        "Nodes": NODE_PANELS,
        "Processes": PROCESSES,
        "Ray Serve": SERVE,
    },
)
