// What golem-js sends and fetches without files: bytes and JSON, in single commands, in one batch and beside a streamed
// command. Usage: node golem_js_data.cjs FOLDER TAG. FOLDER is where golem-js is installed, TAG a Docker image with a
// shell. Prints {"ok": true, "agreement": ..} or {"ok": false, "error": ..}. It takes the CommonJS build of 3.6.0: the
// other one breaks downloadData.
const assert = require("node:assert");
const { createHash } = require("node:crypto");
const { createRequire } = require("node:module");

const [folder, tag] = process.argv.slice(2);
const { GolemNetwork } = createRequire(`${folder}/`)("@golem-sdk/golem-js");

const order = {
  demand: { workload: { imageTag: tag, runtime: { name: "vm" }, minStorageGib: 0.5 } },
  market: {
    rentHours: 0.5,
    pricing: { model: "linear", maxStartPrice: 0.5, maxCpuPerHourPrice: 1.0, maxEnvPerHourPrice: 0.5 },
  },
};
const data = new Uint8Array(1_500_000).map((_, index) => (index * 7919) >> 5);
const sha256 = createHash("sha256").update(data).digest("hex");

async function work(exe) {
  await exe.uploadData(data, "/golem/work/in");
  assert.strictEqual((await exe.run("sha256sum </golem/work/in")).stdout.split(" ")[0], sha256);
  const back = await exe.downloadData("/golem/work/in");
  assert.deepStrictEqual(new Uint8Array(back.data), data);

  await exe.uploadJson({ list: [1, 2.5, null], text: "zażółć" }, "/golem/work/json");
  assert.deepStrictEqual((await exe.downloadJson("/golem/work/json")).data, { list: [1, 2.5, null], text: "zażółć" });
  await exe.uploadData(new Uint8Array(0), "/golem/work/empty");
  assert.strictEqual((await exe.downloadData("/golem/work/empty")).data.byteLength, 0);

  const results = await exe
    .beginBatch()
    .uploadData(data.slice(0, 300_000), "/golem/work/a")
    .uploadJson({}, "/golem/work/b")
    .run("cat /golem/work/a /golem/work/b | wc -c")
    .end();
  assert.strictEqual(Number(results[2].stdout), 300_002);

  let streamed = "";
  const process = await exe.runAndStream("cat /golem/work/json; echo done >&2");
  process.stdout.subscribe((text) => (streamed += text));
  await process.waitForExit();
  assert.deepStrictEqual(JSON.parse(streamed).text, "zażółć");

  const missing = await exe.downloadData("/golem/work/none").catch((error) => error);
  assert.match(String(missing.message ?? missing.previous), /none|not found|No such/);
}

async function main() {
  const glm = new GolemNetwork();
  try {
    await glm.connect();
    const rental = await glm.oneOf({ order, volumes: { work: { path: "/golem/work", sizeGib: 0.25 } }, signalOrTimeout: 60_000 });
    await work(await rental.getExeUnit());
    await rental.stopAndFinalize();
    return { ok: true, agreement: rental.agreement.id };
  } finally {
    await glm.disconnect();
  }
}

main()
  .catch((error) => ({ ok: false, error: `${error.stack} ${error.previous ?? ""}` }))
  .then((result) => {
    console.log(JSON.stringify(result));
    process.exitCode = result.ok ? 0 : 1;
  });
