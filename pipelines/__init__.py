from pipelines import environment

environment.defaults(environment.IMPORT)
