"""What the service runs on: replicas, GPUs, machines, processes, Ray."""

from __future__ import annotations

from alerts.dashboards.panels import Board, Panel, Variable
from alerts.dashboards.promql import (
    DEPLOYMENT,
    MODEL,
    bound,
    bucket,
    highest,
    on_node,
    per_second,
    quantile,
    quantiles,
    share,
    total,
)

REPLICA = ("model", "replica")
OF_ONE = "{{model}} {{replica}}"
NODE = ("instance",)
MIB = 2**20  # Ray calls its figures of GPUs bytes
# Ray Serve's numbers of them.
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
IN_STATE = {0: (" ", "transparent"), 1: ("here", "blue")}


def _of_nodes(metric: str, where: str = "", by: tuple[str, ...] = NODE) -> str:
    return f"max by ({', '.join(by)}) {on_node(metric, where)}"


REPLICAS = (
    Panel(
        "Replicas ready",
        "Replicas that can answer, beside what their load asks for and what Ray starts. Asked for and not ready "
        "for long: no room in the cluster, or max_replicas.",
        "short",
        (
            (f"max by (model) (serve_app_ready_replicas{{{MODEL}}})", "{{model}} ready"),
            (highest("ray_serve_autoscaling_desired_replicas", ("deployment",), DEPLOYMENT), "{{deployment}} desired"),
            (highest("ray_serve_autoscaling_target_replicas", ("deployment",), DEPLOYMENT), "{{deployment}} target"),
        ),
        alerts=("NoReadyReplicas", "ReplicasTooFew", "DeploymentWithoutReplica"),
    ),
    Panel(
        "Healthy to Ray, and engines seen",
        "Replicas whose health checks pass, and engines that report. An engine without health is about to be replaced; "
        "a line like a saw is a replica that crashes again and again.",
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
        "Deployments",
        "Ray Serve's status of each. Asleep by intent is healthy; what stays blue for minutes does not come up.",
        "short",
        ((highest("ray_serve_deployment_status", ("deployment",), DEPLOYMENT), "{{deployment}}"),),
        "states",
        alerts=("DeploymentWithoutReplica", "DeployFailed"),
        words=STATUS,
    ),
    Panel(
        "Models",
        "Ready, loading, asleep or failed, one line for each that was. Failed: /ready says why, and Ray tries again.",
        "short",
        ((f"max by (model, state) (serve_app_model_state{{{MODEL}}}) == 1", "{{model}} {{state}}"),),
        "states",
        alerts=("ScaleFromZeroSlow",),
        words=IN_STATE,
    ),
    Panel(
        "Loading",
        "How long each engine took to load, once. It is what a new replica and a waking model cost.",
        "s",
        ((highest("serve_app_model_load_seconds", REPLICA), OF_ONE),),
        alerts=("ScaleFromZeroSlow",),
    ),
    Panel(
        "Waking",
        "First request that found a model asleep to its first answer, of the last hour. Above the bound callers "
        "without a stream got 503: keep a replica, or make loading faster.",
        "s",
        tuple(
            (
                f"histogram_quantile({one}, sum by (le, model) "
                f"(increase(serve_app_model_wake_seconds_bucket{{{MODEL}}}[1h])))",
                f"{{{{model}}}} p{float(one) * 100:g}",
            )
            for one in ("0.5", "0.99")
        ),
        bounds=(bucket("ScaleFromZeroSlow"),),
        alerts=("ScaleFromZeroSlow",),
    ),
)

LOAD = (
    Panel(
        "Active requests",
        "Requests that have arrived and not ended, and open HTTP connections that wait for or read an answer.",
        "short",
        (
            (total("serve_app_active_requests"), "{{model}} requests"),
            (total("serve_app_http_open_requests", ("replica",), ""), "{{replica}} HTTP"),
        ),
    ),
    Panel(
        "Queue",
        "Sequences that wait for a slot. As many as there are slots, for minutes: the last waits for a whole answer.",
        "short",
        (
            (f"serve_app:queue_depth:sum{{{MODEL}}}", "{{model}} wait"),
            (f"serve_app:slots:sum{{{MODEL}}}", "{{model}} slots"),
        ),
        alerts=("QueueLong",),
    ),
    Panel(
        "Slots in use by replica",
        "Sequences in a slot, of each replica. Far apart: the router sees something that this board does not.",
        "short",
        ((highest("serve_app_running_sequences", REPLICA), OF_ONE),),
    ),
    Panel(
        "Ray: queued and processing",
        "Requests in Ray's handles and in its replicas. Queued here as well as above: max_ongoing_requests is low.",
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
        "Load that scaling sees",
        "Ongoing requests that Ray divides by target_ongoing_requests to know how many replicas it wants.",
        "short",
        ((highest("ray_serve_autoscaling_total_requests", ("deployment",), DEPLOYMENT), "{{deployment}}"),),
        alerts=("ReplicasTooFew",),
        width=12,
    ),
    Panel(
        "Bytes out by route",
        "What callers were sent. Streams are some hundred bytes a frame; a jump without tokens is large answers.",
        "Bps",
        ((per_second("serve_app_http_sent_bytes_total", ("route",), ""), "{{route}}"),),
        stacked=True,
        width=12,
    ),
    Panel(
        "Bytes in by route",
        "What callers sent: prompts. A jump here comes before a jump of prefill.",
        "Bps",
        ((per_second("serve_app_http_received_bytes_total", ("route",), ""), "{{route}}"),),
        stacked=True,
        width=12,
    ),
)

GPUS = (
    Panel(
        "GPU utilisation",
        "Share of the time in which a kernel ran, whoever measured it. Above the bound for long there is no reserve.",
        "percentunit",
        (('serve_app:gpu_utilization:ratio{node=~"$node"}', "{{node}} {{gpu}}"),),
        bounds=(bound("GPUUtilizationHigh"),),
        alerts=("GPUUtilizationHigh",),
        full=1,
    ),
    Panel(
        "GPU memory in use",
        "Share of each GPU's memory. Above the bound the next allocation may end a replica: lower kv_memory_fraction.",
        "percentunit",
        (('serve_app:gpu_memory:ratio{node=~"$node"}', "{{node}} {{gpu}}"),),
        bounds=(bound("GPUMemoryNearlyFull"),),
        alerts=("GPUMemoryNearlyFull",),
        full=1,
    ),
    Panel(
        "GPU memory, bytes",
        "What replicas see by NVML, and where they do not, what Ray's agents see.",
        "bytes",
        (
            ('max by (node, gpu) (serve_app_gpu_memory_used_bytes{node=~"$node"})', "{{node}} {{gpu}} used"),
            (f"{MIB} * {_of_nodes('ray_node_gram_used', by=('ip', 'GpuIndex'))}", "{{ip}} {{GpuIndex}} used, by Ray"),
        ),
        alerts=("GPUMemoryNearlyFull",),
    ),
)

MACHINES = (
    Panel(
        "CPU of nodes",
        "Share of all cores. On CPU a busy model takes all that it may; beside a GPU it should stay low.",
        "percent",
        ((_of_nodes("ray_node_cpu_utilization"), "{{instance}}"),),
        full=100,
    ),
    Panel(
        "Memory of nodes",
        "Share of a node's memory, by its control group where it has one. Near 100 % Ray kills the youngest worker.",
        "percentunit",
        (
            (
                f"{_of_nodes('ray_node_mem_used')} / {_of_nodes('ray_node_mem_total')}",
                "{{instance}}",
            ),
        ),
        full=1,
    ),
    Panel(
        "Network of nodes",
        "Bytes a second of all interfaces, by Ray's agents. Tokens need little; much is a model that is fetched.",
        "Bps",
        (
            (_of_nodes("ray_node_network_receive_speed"), "{{instance}} received"),
            (_of_nodes("ray_node_network_send_speed"), "{{instance}} sent"),
        ),
    ),
    Panel(
        "Disk in use",
        "Share of each disk, by node_exporter or by Ray. Full disks stop logs, spilling and downloads of models.",
        "percentunit",
        (
            ('1 - serve_app:disk_free:ratio{instance=~"$node"}', "{{instance}} {{mountpoint}}"),
            (
                f"{_of_nodes('ray_node_disk_usage')} / "
                f"({_of_nodes('ray_node_disk_usage')} + {_of_nodes('ray_node_disk_free')})",
                "{{instance}} /, by Ray",
            ),
        ),
        bounds=(round(1 - bound("DiskNearlyFull"), 4),),
        alerts=("DiskNearlyFull",),
        full=1,
    ),
    Panel(
        "Disk traffic",
        "Bytes a second read and written. Reading for minutes after a start is a model that loads.",
        "Bps",
        (
            (_of_nodes("ray_node_disk_io_read_speed"), "{{instance}} read"),
            (_of_nodes("ray_node_disk_io_write_speed"), "{{instance}} written"),
        ),
    ),
    Panel(
        "Object store",
        "Ray's shared memory in use and spilled to disk. Tokens hardly touch it; growth is somebody else's objects.",
        "bytes",
        (
            (_of_nodes("ray_object_store_used_memory"), "{{instance}} used"),
            (_of_nodes("ray_object_store_memory", 'Location="SPILLED"'), "{{instance}} spilled"),
        ),
    ),
    Panel(
        "CPUs that are reserved",
        "CPUs of each node that replicas have reserved, of those there are. All reserved: no further replica fits. "
        "A line that ends is a node that is gone.",
        "short",
        (
            (f"sum by (instance) {on_node('ray_resources', CPUS_USED)}", "{{instance}} reserved"),
            (f"sum by (instance) {on_node('ray_resources', CPUS)}", "{{instance}} there"),
        ),
        alerts=("NodeLost",),
        width=24,
    ),
)

PROCESSES = (
    Panel(
        "CPU of processes",
        "Cores that each process uses. An ingress near 1 is the bottleneck, whatever the models do.",
        "short",
        ((per_second("process_cpu_seconds_total", REPLICA), OF_ONE),),
    ),
    Panel(
        "Memory of processes",
        "Resident memory of each, and the address space. Resident that only rises is a leak; address space alone means "
        "nothing, since slots that nobody used are in it.",
        "bytes",
        (
            (highest("process_resident_memory_bytes", REPLICA), f"{OF_ONE} resident"),
            (highest("process_virtual_memory_bytes", REPLICA), f"{OF_ONE} address space"),
        ),
    ),
    Panel(
        "Open files",
        "Share of the files and connections that a process may open. At 1 it accepts nobody: raise the limit.",
        "percentunit",
        ((share(highest("process_open_fds", REPLICA), highest("process_max_fds", REPLICA)), OF_ONE),),
        full=1,
    ),
    Panel(
        "Event loop's delay",
        "How late a process's event loop comes to its turns. Over 50 ms every stream of it stutters: something blocks.",
        "s",
        ((highest("serve_app_event_loop_lag_seconds", REPLICA), OF_ONE),),
    ),
    Panel(
        "Age of the figures",
        "How old the newest push of each process is. Over 5 s a process is forgotten, and its lines end.",
        "s",
        ((highest("serve_app_snapshot_age_seconds", REPLICA), OF_ONE),),
    ),
    Panel(
        "Uptime",
        "Time since each process began. What falls to 0 has been replaced.",
        "s",
        ((f"time() - {highest('process_start_time_seconds', REPLICA)}", OF_ONE),),
        alerts=("ReplicasFlap",),
    ),
    Panel(
        "Notice board answers",
        "Whether the hub that gathers all figures could be asked. Without it, requests go on and this page is empty.",
        "short",
        (("max(serve_app_metrics_hub_up)", "hub"),),
        "states",
        words=YES_NO,
    ),
    Panel(
        "Versions",
        "What runs. Two rows are a rollout under way, or one that stopped half-way.",
        "short",
        (("max by (version, python, ray, torch, transformers) (serve_app_build_info)", ""),),
        "table",
    ),
    Panel(
        "How models run",
        "lean is the quick path; packed on a Llama-like model means that no compiler was found, or a self-test failed.",
        "short",
        ((f"max by (model, replica, kind) (serve_app_runner_info{{{MODEL}}})", ""),),
        "table",
    ),
)

SERVE = (
    Panel(
        "Ray: HTTP by status",
        "Requests at Ray's proxy by status. 5xx here and not in our own figures: the proxy had nobody to ask.",
        "reqps",
        (("sum by (status_code) (rate(ray_serve_num_http_requests_total[$__rate_interval]))", "{{status_code}}"),),
        alerts=("ServiceDown",),
        stacked=True,
    ),
    Panel(
        "Ray: HTTP time",
        "At the proxy, by route. Its excess over our own HTTP time is the proxy's and the network's.",
        "ms",
        quantiles("ray_serve_http_request_latency_ms", ("route",), "", ("0.5", "0.99")),
    ),
    Panel(
        "Ray: health checks",
        "Time of a replica's answer to Ray's question whether it lives. Near its time-out it will be replaced.",
        "ms",
        ((quantile("0.99", "ray_serve_health_check_latency_ms", ("deployment",), DEPLOYMENT), "{{deployment}} p99"),),
    ),
    Panel(
        "Ray: event loops",
        "How late the loops of Ray's proxy and replicas come to their turns.",
        "ms",
        ((quantile("0.99", "ray_serve_event_loop_scheduling_latency_ms", ("component",), ""), "{{component}} p99"),),
        width=12,
    ),
    Panel(
        "Ray: replicas' start",
        "From Ray's decision to a replica that answers, of all starts that the cluster has seen.",
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
        "One a node. Not healthy: callers of that node are turned away, whatever the models do.",
        "short",
        (("max by (node_ip_address) (ray_serve_proxy_status)", "{{node_ip_address}}"),),
        "states",
        alerts=("ServiceDown",),
        words=PROXY,
        width=12,
    ),
    Panel(
        "Ray: controller's round",
        "Time of the controller's control loop. Over a second it is late with health checks and scaling.",
        "s",
        (("max(ray_serve_controller_control_loop_duration_s)", "round"),),
        width=12,
    ),
)

# An alert's node is a host's name (NVML), an address (Ray's GPUs) or a scrape's instance: any of them can be chosen.
NODES = (
    'query_result(group by (node) (label_replace(ray_node_mem_total, "node", "$1", "instance", "(.*)"))'
    ' or group by (node) (label_replace(ray_node_mem_total, "node", "$1", "ip", "(.*)"))'
    " or group by (node) (serve_app_gpu_memory_total_bytes))"
)

BOARD = Board(
    uid="serve-app-resources",
    title="serve_app: resources and Ray",
    description="Replicas, load, GPUs, machines, processes and Ray Serve.",
    variables=(
        Variable("model", "Model", "label_values(serve_app_model_state, model)"),
        Variable("deployment", "Deployment", "label_values(ray_serve_deployment_status, deployment)"),
        Variable("node", "Node", NODES, '/node="([^"]+)"/'),
    ),
    rows={
        "Replicas and models": REPLICAS,
        "Load": LOAD,
        "GPUs": GPUS,
        "Machines": MACHINES,
        "Processes": PROCESSES,
        "Ray Serve": SERVE,
    },
)
