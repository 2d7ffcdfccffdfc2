// What the scripts of the client libraries share.
export const MODEL = "smollm2-135m";
export const FRANCE = "What is the capital of France?";
export const WEATHER = "What is the weather in Paris?";
export const TOWN = "Tell me of a town in Spain.";
// More tokens than the context of the model has.
export const OVERFLOW = "word ".repeat(10_000);

// Call each check with the address of the service, and print their results by name as one line of JSON.
export async function run(checks) {
  const results = {};
  for (const [name, check] of Object.entries(checks)) results[name] = await check(process.argv[2]);
  console.log(JSON.stringify(results));
}
