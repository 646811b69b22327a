"""A Kubernetes of one node on this machine: etcd, control plane, kube-proxy, kubelet, containerd.

`build.sh` makes the programs. It is version 1.20, which is what Debian 12 has the source of, so
manifests are rewritten for it on copies, and what it does not know is left out; test_kubernetes.py
has the schemas of today's versions. There is no DNS, no metrics server, no enforcement of network
policies and no Pod Security admission.
"""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from engine import wait

WORK = Path(os.environ.get("CLUSTER_DIR", "/var/tmp/inception-transfer-cluster"))
BIN = WORK / "bin"
BRIDGE = "it-cluster0"
NETWORK = ipaddress.ip_network("10.202.7.0/24")
ADDRESS = "10.202.7.1"
SERVICES = "10.96.0.0/24"
SERVER = f"https://{ADDRESS}:18172"
ETCD = "http://127.0.0.1:18170"

KUBECONFIG = f"""
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "{SERVER}", insecure-skip-tls-verify: true}}}}]
users: [{{name: u, user: {{token: admintoken}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
current-context: x
"""
KUBELET = f"""
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: {ADDRESS}
port: 18181
healthzPort: 18182
readOnlyPort: 0
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failSwapOn: false
resolvConf: /etc/resolv.conf
evictionHard: {{memory.available: 50Mi}}
imageGCHighThresholdPercent: 100
maxPods: 20
"""
CONTAINERD = """
version = 2
root = "{run}/containerd-root"
state = "{run}/containerd"
[grpc]
address = "{run}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/pause:1"
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{run}/cni"
"""
CNI = {
    "cniVersion": "0.4.0",
    "name": "it-cluster",
    "plugins": [
        {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": str(NETWORK), "rangeStart": "10.202.7.10"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}
# What today's manifests say and 1.20 calls by an older name.
OLDER = {
    "batch/v1": "batch/v1beta1",
    "policy/v1": "policy/v1beta1",
    "autoscaling/v2": "autoscaling/v2beta2",
}


def run(
    *command: str | Path, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, **options
    )
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def for_1_20(thing: dict[str, Any]) -> dict[str, Any]:
    """A manifest under the API version that this cluster has for its kind."""
    version = thing["apiVersion"]
    if thing["kind"] == "Job":
        return thing
    return {**thing, "apiVersion": OLDER.get(version, version)}


class Cluster:
    """Use it as a context; everything it started or set up is gone afterwards."""

    def __init__(self) -> None:
        self.run_dir = WORK / "run"
        self.socket = self.run_dir / "containerd.sock"
        self.config = self.run_dir / "kubeconfig"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        scripts = sysconfig.get_path("scripts")
        self.kubectl_path = shutil.which("kubectl", path=f"{scripts}:{os.environ['PATH']}")
        self.forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text()

    def __enter__(self) -> "Cluster":
        run(Path(__file__).parent / "build.sh", WORK)
        self.__exit__()  # what a run before may have left
        self.run_dir.mkdir()
        try:
            self._network()
            self._control_plane()
            self._node()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_pods()
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGKILL)
            process.wait()
        self._stop_shims()
        self._unmount()
        self._forget_rules()
        for name in run("ip", "netns", "list").stdout.split():
            if name.startswith("cni-"):
                run("ip", "netns", "delete", name, check=False)
        run("ip", "link", "delete", BRIDGE, check=False)
        Path("/proc/sys/net/ipv4/ip_forward").write_text(self.forwarding)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def _network(self) -> None:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{ADDRESS}/{NETWORK.prefixlen}", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        (self.run_dir / "cni").mkdir()
        (self.run_dir / "cni" / "10-bridge.conflist").write_text(json.dumps(CNI))

    def _control_plane(self) -> None:
        self.config.write_text(KUBECONFIG)
        (self.run_dir / "tokens.csv").write_text('admintoken,admin,1,"system:masters"\n')
        run("openssl", "genrsa", "-out", self.run_dir / "sa.key", "2048")
        peers = "http://127.0.0.1:18171"
        self._start(
            "etcd",
            "--data-dir=etcd",
            f"--listen-client-urls={ETCD}",
            f"--advertise-client-urls={ETCD}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
        )
        self._start(
            "kube-apiserver",
            f"--etcd-servers={ETCD}",
            f"--bind-address={ADDRESS}",
            f"--advertise-address={ADDRESS}",
            "--secure-port=18172",
            "--insecure-port=0",
            "--cert-dir=certs",
            f"--service-cluster-ip-range={SERVICES}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-signing-key-file=sa.key",
            "--service-account-key-file=sa.key",
            "--token-auth-file=tokens.csv",
            "--authorization-mode=RBAC",
            "--enable-admission-plugins=ResourceQuota,LimitRanger,ServiceAccount",
            "--kubelet-preferred-address-types=InternalIP",
        )
        ready = ("get", "--raw=/readyz")
        wait("the API server", lambda: self.kubectl(*ready, check=False).stdout == "ok")
        own = ("--kubeconfig=kubeconfig", "--leader-elect=false", "--port=0", "--cert-dir=certs")
        self._start(
            "kube-controller-manager",
            *own,
            "--secure-port=18173",
            "--bind-address=127.0.0.1",
            "--service-account-private-key-file=sa.key",
            "--root-ca-file=certs/apiserver.crt",
            "--controllers=*,-nodeipam",
        )
        self._start("kube-scheduler", *own, "--secure-port=18174", "--bind-address=127.0.0.1")

    def _node(self) -> None:
        (self.run_dir / "containerd.toml").write_text(CONTAINERD.format(run=self.run_dir))
        self._start("containerd", "--config=containerd.toml")
        wait("containerd", lambda: self.ctr("version", check=False).returncode == 0)
        (self.run_dir / "kubelet.yaml").write_text(KUBELET)
        self._start(
            "kubelet",
            "--config=kubelet.yaml",
            "--kubeconfig=kubeconfig",
            f"--root-dir={self.run_dir / 'kubelet'}",
            "--cert-dir=kubelet-certs",
            "--container-runtime=remote",
            f"--container-runtime-endpoint=unix://{self.socket}",
            f"--image-service-endpoint=unix://{self.socket}",
            "--hostname-override=n1",
            f"--node-ip={ADDRESS}",
        )
        # Pods share one bridge, so that answers would pass the translation of addresses by.
        self._start(
            "kube-proxy",
            "--kubeconfig=kubeconfig",
            "--proxy-mode=iptables",
            "--masquerade-all",
            "--hostname-override=n1",
            "--healthz-bind-address=127.0.0.1:18176",
            "--metrics-bind-address=127.0.0.1:18177",
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0s",
            "--conntrack-tcp-timeout-close-wait=0s",
        )
        wait("the node", lambda: " Ready" in self.kubectl("get", "nodes", check=False).stdout)

    def _start(self, program: str, *arguments: str) -> None:
        path = BIN / program if (BIN / program).is_file() else Path(shutil.which(program) or "")
        with (self.run_dir / f"{program}.log").open("wb") as log:
            self.processes[program] = subprocess.Popen(
                [path, *arguments], cwd=self.run_dir, stdout=log, stderr=log
            )

    def kubectl(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        namespace = ("--kubeconfig", self.config, "--namespace=inception-transfer")
        return run(self.kubectl_path or "kubectl", *namespace, *arguments, **options)

    def get(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", "-o=json", *arguments).stdout)
        return found

    def apply(self, things: list[dict[str, Any]]) -> None:
        items = {"apiVersion": "v1", "kind": "List", "items": list(map(for_1_20, things))}
        self.kubectl("apply", "--validate=false", "--filename=-", input=json.dumps(items))

    def ctr(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return run("ctr", "--address", self.socket, "--namespace=k8s.io", *arguments, **options)

    def _stop_pods(self) -> None:
        if not self.socket.exists():
            return
        for line in self.ctr("tasks", "list", "--quiet", check=False).stdout.split():
            self.ctr("tasks", "kill", "--signal=SIGKILL", line, check=False)

    def _stop_shims(self) -> None:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().split(b"\0")
                if b"containerd-shim" in command[0] and str(self.socket).encode() in command:
                    os.kill(int(folder.name), signal.SIGKILL)

    def _forget_rules(self) -> None:
        """Takes Kubernetes's and the pods' rules out of iptables, and leaves everybody else's."""
        if (BIN / "kube-proxy").is_file():
            run(BIN / "kube-proxy", "--cleanup", check=False)
        saved = run("iptables-save").stdout.splitlines()
        ours = {line.split()[-1] for line in saved if "it-cluster" in line and "-j CNI-" in line}
        kept = [
            line
            for line in saved
            if not re.search("KUBE-|it-cluster", line)
            and line.split(" ")[0].removeprefix(":") not in ours
        ]
        run("iptables-restore", input="\n".join([*kept, ""]))

    def _unmount(self) -> None:
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([m for m in mounts if m.startswith(f"{self.run_dir}/")]):
            run("umount", "--lazy", mount, check=False)
