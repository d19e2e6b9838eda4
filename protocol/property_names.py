"""The names of properties, each once: what offers and demands say, and what a usage vector counts. `properties` has the forms."""

from __future__ import annotations

from typing import Final

NODE_NAME: Final = "golem.node.id.name"
SUBNET: Final = "golem.node.debug.subnet"
IS_PUBLIC: Final = "golem.node.net.is-public"
CPU_ARCHITECTURE: Final = "golem.inf.cpu.architecture"
CPU_CORES: Final = "golem.inf.cpu.cores"
CPU_THREADS: Final = "golem.inf.cpu.threads"
CPU_VENDOR: Final = "golem.inf.cpu.vendor"
CPU_BRAND: Final = "golem.inf.cpu.brand"
CPU_MODEL: Final = "golem.inf.cpu.model"
CPU_CAPABILITIES: Final = "golem.inf.cpu.capabilities"
MEM_GIB: Final = "golem.inf.mem.gib"
STORAGE_GIB: Final = "golem.inf.storage.gib"
RUNTIME_NAME: Final = "golem.runtime.name"
RUNTIME_VERSION: Final = "golem.runtime.version"
RUNTIME_CAPABILITIES: Final = "golem.runtime.capabilities"
MULTI_ACTIVITY: Final = "golem.srv.caps.multi-activity"
PAYLOAD: Final = "golem.srv.comp.payload"
PAYLOAD_CAPABILITY: Final = "golem.srv.caps.payload-manifest"
TASK_PACKAGE: Final = "golem.srv.comp.task_package"
EXPIRATION: Final = "golem.srv.comp.expiration"  # when the agreement ends, in ms since the epoch
TRANSFER_PROTOCOLS: Final = "golem.activity.caps.transfer.protocol"
TRANSFER_REACH: Final = "golem.activity.caps.transfer.reach"  # "public" addresses alone, or "local" ones for who is there
TRANSFER_PROGRESS: Final = "golem.activity.caps.transfer.report-progress"
DEPLOY_PROGRESS: Final = "golem.activity.caps.deploy.report-progress"
COST_CAP: Final = "golem.activity.cost_cap"
SCHEME: Final = "golem.com.scheme"
PRICING_MODEL: Final = "golem.com.pricing.model"
COEFFS: Final = "golem.com.pricing.model.linear.coeffs"  # prices of a unit, in the order of `VECTOR`, and of the start
VECTOR: Final = "golem.com.usage.vector"  # the counters that are billed
PAYMENT_VERSION: Final = "golem.com.payment.protocol.version"
CHOSEN_PLATFORM: Final = "golem.com.payment.chosen-platform"
LOCAL_CHAIN: Final = "golem.com.payment.local-chain"  # in offers and demands: on which dev chain the platforms are
CREDIT: Final = "golem.com.payment.credit"  # what an offer gives a stranger on its own terms, in GLM
USAGE_DURATION: Final = "golem.usage.duration_sec"
USAGE_CPU: Final = "golem.usage.cpu_sec"
USAGE_MEM: Final = "golem.usage.gib"
USAGE_STORAGE: Final = "golem.usage.storage_gib"
PLATFORM_PREFIX: Final = "golem.com.payment.platform."  # before a platform's name
PLATFORM_ADDRESS: Final = ".address"  # and behind it
ACCEPT_TIMEOUT: Final = "golem.com.payment.debit-notes.accept-timeout?"  # in seconds, negotiated
INTERVAL: Final = "golem.com.scheme.payu.debit-note.interval-sec?"  # in seconds, negotiated
PAYMENT_TIMEOUT: Final = "golem.com.scheme.payu.payment-timeout-sec?"  # in seconds, negotiated
