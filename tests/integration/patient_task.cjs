// One task with the unmodified golem-js, whose command depends on the provider that gets it (run by test_gone_provider.py).
// A provider that fails is left alone, and the task goes to another one.
//
//     node patient_task.cjs FOLDER PACKAGE SUBNET PROVIDER=ENTRY ...
//
// FOLDER is where golem-js is installed. Prints a JSON object: the provider that did the task, its output, and the
// providers of all rentals. It does not wait for invoices: one of the providers may never send any.
const { createRequire } = require("node:module");

const [folder, pack, subnetTag, ...pairs] = process.argv.slice(2);
const { GolemNetwork, OfferProposalFilterFactory } = createRequire(`${folder}/`)("@golem-sdk/golem-js");
const commands = Object.fromEntries(pairs.map((pair) => pair.split("=")));

async function main() {
  const glm = new GolemNetwork();
  await glm.connect();
  const agreements = [];
  const failed = [];
  for (;;) {
    const rental = await glm.oneOf({
      order: {
        demand: { workload: { imageUrl: `file://${pack}`, runtime: { name: "wasmtime" }, minStorageGib: 0.5 }, subnetTag },
        market: {
          rentHours: 0.5,
          pricing: { model: "linear", maxStartPrice: 0.5, maxCpuPerHourPrice: 1.0, maxEnvPerHourPrice: 0.5 },
          offerProposalFilter: OfferProposalFilterFactory.disallowProvidersById(failed),
        },
      },
    });
    const { id, name } = rental.agreement.provider;
    agreements.push(name);
    try {
      const exe = await rental.getExeUnit();
      const done = await exe.run(commands[name], []);
      if (done.result !== "Ok") throw new Error(done.message);
      return { ok: true, provider: name, stdout: done.stdout, agreements };
    } catch (error) {
      console.error(`${name}: ${error}`);
      failed.push(id);
      rental.stopAndFinalize(1000).catch((problem) => console.error(`${name}: ${problem}`));
    }
  }
}

main()
  .catch((error) => ({ ok: false, error: String(error.previous ?? error) }))
  .then((result) => {
    console.log(JSON.stringify(result));
    process.exit(result.ok ? 0 : 1);
  });
