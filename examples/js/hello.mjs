#!/usr/bin/env node
/**
 * The smallest requestor in JavaScript: one task on the market with the unmodified golem-js 3.6.
 *
 *     npm ci                                        (once, in this folder)
 *     YAGNA_APPKEY=... node hello.mjs --subnet demo World
 *     YAGNA_APPKEY=... GOLEM_REGISTRY_URL=http://127.0.0.1:7465 node hello.mjs --tag alpine:3.20 World
 *
 * Hires one provider, sends it a letter (--letter FILE), has it write a greeting above the letter, fetches the result
 * (--result FILE) and waits until the invoice is accepted. Files travel as golem-js does it by default: over a websocket to
 * the own node, which providers ask. Without --tag the image is ../hello/hello.wasm on the runtime wasmtime, sent the same
 * way; with it, a Docker image that has a shell, on the runtime vm, found through the registry of the own node (`golem image
 * push alpine:3.20`). Progress goes to stderr; stdout gets one JSON object: greeting, provider, agreement, or "ok": false
 * and the error.
 */
import { access } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { GolemNetwork } from "@golem-sdk/golem-js";

const HERE = dirname(fileURLToPath(import.meta.url));
const INPUT = "/golem/work/letter.txt";
const OUTPUT = "/golem/work/hello.txt";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    subnet: { type: "string" }, // default: YAGNA_SUBNET, else public
    tag: { type: "string" },
    letter: { type: "string", default: join(HERE, "letter.txt") },
    result: { type: "string", default: "hello.txt" },
    timeout: { type: "string", default: "300" }, // seconds
  },
});
const name = positionals[0] ?? "World";
const say = (text) => console.error(text);

const workload = options.tag
  ? { imageTag: options.tag, runtime: { name: "vm" } }
  : { imageUrl: `file://${join(HERE, "..", "hello", "hello.wasm")}`, runtime: { name: "wasmtime" } };

const order = {
  demand: { workload: { ...workload, minStorageGib: 0.5 }, ...(options.subnet && { subnetTag: options.subnet }) },
  market: {
    rentHours: 0.5,
    pricing: { model: "linear", maxStartPrice: 0.5, maxCpuPerHourPrice: 1.0, maxEnvPerHourPrice: 0.5 },
  },
};

/** Greet above the letter; returns what the program printed. */
async function greet(exe) {
  await exe.uploadFile(options.letter, INPUT);
  say(`${exe.provider.name} has the letter`);
  const script = `(echo "Hello $1"; cat ${INPUT}) >${OUTPUT} && echo "Hello $1"`;
  const done = options.tag
    ? await exe.run("/bin/sh", ["-c", script, "sh", name])
    : await exe.run("hello", [name, INPUT, OUTPUT]);
  if (done.result !== "Ok") throw new Error(`the command failed: ${done.message} ${done.stderr ?? ""}`);
  const fetched = await exe.downloadFile(OUTPUT, options.result);
  if (fetched.result !== "Ok") throw new Error(`the download failed: ${fetched.message}`);
  say(`the answer is in ${options.result}`);
  return done.stdout;
}

async function main() {
  const glm = new GolemNetwork();
  glm.payment.events.on("invoiceAccepted", ({ invoice }) => say(`invoice accepted: ${invoice.amount} GLM`));
  try {
    await glm.connect();
    const rental = await glm.oneOf({
      order,
      volumes: { work: { path: dirname(INPUT), sizeGib: 0.25 } },
      signalOrTimeout: Number(options.timeout) * 1000,
    });
    const exe = await rental.getExeUnit();
    const stdout = await greet(exe);
    await rental.stopAndFinalize();
    return { ok: true, stdout, provider: exe.provider.name, agreement: rental.agreement.id };
  } finally {
    await glm.disconnect();
  }
}

let result;
try {
  await access(options.letter);
  result = await main();
} catch (error) {
  result = { ok: false, error: String(error.previous ?? error) };
}
console.log(JSON.stringify(result));
process.exitCode = result.ok ? 0 : 1;
